"""What policies answer."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Tokens that one sequence gets in a step.

    Attributes:
        seq_id: The sequence.
        num_tokens: Tokens to compute: 1 for a decode, more for a chunk of a prefill.
        num_draft: Draft tokens to verify besides, at most as many as the view offers. Only decodes
            have drafts, and only steps without prefill.
    """

    seq_id: int
    num_tokens: int
    num_draft: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One turn of the engine.

    Attributes:
        work: What runs, running sequences and newly admitted ones alike.
        admit: Waiting sequences that get a row, in this order; each also appears in `work`.
        preempt: Running sequences that lose row and pages and wait to be recomputed.
    """

    work: tuple[Work, ...] = ()
    admit: tuple[int, ...] = ()
    preempt: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the step, drafts included."""
        return sum(item.num_tokens + item.num_draft for item in self.work)
