"""What is asked of the kernel over lists of tokens before an engine uses it."""

import pytest

from jaxserve.engine.kernel_check import find_list_fault
from jaxserve.engine.kernel_plans import KernelPlans
from jaxserve.pallas_kernels.state import AttentionState
from jaxserve.pallas_kernels.token_attention import api

PLANS = KernelPlans(
    backend="mosaic",
    q_heads=4,
    kv_heads=2,
    head_dim=64,
    page_size=16,
    dtype="float16",
    windows=(None,),
    max_model_len=4096,
    batch_invariant=False,
    shares=False,
    has_sparse=True,
)


def test_without_a_kernel_over_lists_there_is_nothing_to_check():
    assert find_list_fault(PLANS) is None


@pytest.mark.parametrize(("share", "is_right"), [(1.0, True), (0.9, False)])
def test_a_kernel_over_lists_that_computes_something_else_is_found(monkeypatch, share, is_right):
    asked, attend = [], api.token_attention

    def kernel(*args, backend):
        asked.append(backend)
        if backend == "reference":
            return attend(*args, backend=backend)
        state = attend(*args, backend="xla")
        return AttentionState(o=share * state.o, lse=state.lse)

    monkeypatch.setattr(api, "refusal", lambda *_: None)
    monkeypatch.setattr(api, "token_attention", kernel)
    fault = find_list_fault(PLANS)
    assert asked == ["mosaic", "reference"]
    if is_right:
        assert fault is None
    else:
        assert "it computes something else on this device" in fault
