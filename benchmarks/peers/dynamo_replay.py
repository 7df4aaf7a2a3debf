"""Runs NVIDIA Dynamo's offline replay on a trace, and prints one JSON line per request.

    python dynamo_replay.py TRACE.jsonl PROFILE.npz '{"max_num_seqs": 256, ...}'

Only the compiled core of the package is used, so that none of its dependencies is needed.
"""

import json
import sys

from dynamo import _core


def main() -> None:
    """Replay on one worker; times are in milliseconds."""
    trace, profile, sizes = sys.argv[1:]
    timing = {"type": "external", "provider": "dynamo_profile", "config": {"path": profile}}
    engine = {
        "backend": "vllm",
        "worker_type": "aggregated",
        "enable_prefix_caching": False,
        "enable_chunked_prefill": True,
        "timing_model": timing,
        **json.loads(sizes),
    }
    result = _core.run_mocker_trace_replay(
        [trace],
        extra_engine_args={"engine": engine},
        num_workers=1,
        trace_block_size=512,
        capture_per_request=True,
    )
    for one in result.per_request:
        print(
            json.dumps(
                {
                    "arrival_ms": one["arrival_time_ms"],
                    "ttft_ms": one["ttft_ms"],
                    "tpot_ms": one["itl_ms"],
                    "e2e_ms": one["e2e_latency_ms"],
                    "input_length": one["input_length"],
                    "output_length": one["output_length"],
                }
            )
        )


if __name__ == "__main__":
    main()
