"""One TPU kernel compiled by itself, in a process of its own: `python -m plait.train.pods.plan.compiled.kernel_estimate < JOB`.

A job is JSON: `target` (such as v5e:2x2), `operands` and `results` (pairs of a dtype and a shape) and `config`, the kernel as a compiled
program holds it. Prints the cycles by the compiler's schedule model as JSON, null where it has none. That model ends the process over kernels
that it cannot follow.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from pathlib import Path

_CYCLES = re.compile(r"estimated_cycles: (\d+)")


def main() -> None:
    """Reads a job and prints its estimate."""
    job = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_static_llo_profile_to={folder}"
        import jax
        from jax.sharding import SingleDeviceSharding

        from plait.train.pods.plan.topology import describe_devices, parse_target

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_enable_compilation_cache", False)  # a program that is read has no profile
        where = SingleDeviceSharding(describe_devices(parse_target(job["target"]))[0])
        kernel = jax.ffi.ffi_call(
            "tpu_custom_call",
            [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in job["results"]],
            custom_call_api_version=1,
            legacy_backend_config=json.dumps({"custom_call_config": job["config"]}),
        )
        operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype, shape in job["operands"]]
        jax.jit(kernel).lower(*operands).compile()
        found = [_CYCLES.search(file.read_text()) for file in Path(folder).glob("*.textproto")]
    print(json.dumps(sum(int(one[1]) for one in found if one) or None))


if __name__ == "__main__":
    main()
