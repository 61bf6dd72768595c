from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")


def test_products_in_the_interpreter():
    program = Path(__file__).parent / "bitcpm_triton_checks.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split()[-1] == "ok", done.stderr


@pytest.mark.gpu
def test_products_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    import bitcpm_triton_checks

    bitcpm_triton_checks.check_products("cuda")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_kernels_compile(capability, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bitcpm import triton_linear as t

    tensors = dict(
        x=f"*{dtype}", codes="*u8", scales=f"*{dtype}", bias=f"*{dtype}", out=f"*{dtype}"
    )
    numbers = dict.fromkeys(("O", "I", "W", "G", "size", "x_row"), "i32")
    for kernel, sizes in (
        (t._vector, dict(R=t.VECTOR_ROWS, B=t.VECTOR_BYTES)),
        (t._matrix, dict(M=t.TOKENS, R=t.ROWS, B=t.BYTES)),
    ):
        signature = tensors | ({"T": "i32"} if "M" in sizes else {}) | numbers
        constants = sizes | {"HAS_BIAS": True}
        signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target, {"num_stages": t.STAGES})
        assert compiled.metadata.shared < 99 * 1024


def test_shapes_that_do_not_fit_are_refused():
    from bitcpm.triton_linear import ternary_matmul

    codes, scales = torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4, 1)
    with pytest.raises(ValueError, match=r"codes must be \[O, 3\] and scales \[O, 1\]"):
        ternary_matmul(torch.ones(1, 9), codes, scales, -1)
    with pytest.raises(ValueError, match="one dtype"):
        ternary_matmul(torch.ones(1, 8).half(), codes, scales, -1)
