"""Compiles every kernel for a GPU's architecture, which takes no GPU.

    python tests/helpers/compile_kernels.py 90

Runs in a process of its own, because the tests around it run the kernels in Triton's interpreter.
Prints a line for each kernel.
"""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tarflow_hf.modeling import mixture_cdf_triton, mixture_rosenblatt_triton

MIXTURE = {"K": 3, "BLOCK": 4, "BLOCK_K": 4}
HEAD = {"D": 3, "E": 2, "H": 5, "K": 3, "BLOCK_D": 4, "BLOCK_E": 2, "BLOCK_H": 8, "BLOCK_K": 4}
VOCABULARY = {"D": 3, "BLOCK": 8, "BLOCK_K": 64}
KERNELS = [  # kernel, its constants, the types of its arguments that are not *fp32 (pointers) or i32 (numbers)
    (mixture_cdf_triton._forward_kernel, MIXTURE, {"logits_ptr": "*bf16"}),
    *(
        (mixture_cdf_triton._backward_kernel, MIXTURE | {"INVERSE": inverse}, {})
        for inverse in (False, True)
    ),
    (mixture_cdf_triton._log_prob_kernel, MIXTURE, {"logits_ptr": "*fp16"}),
    (mixture_cdf_triton._log_prob_backward_kernel, MIXTURE, {}),
    (mixture_cdf_triton._inverse_kernel, MIXTURE, {}),
    (mixture_cdf_triton._autoregressive_inverse_kernel, HEAD, {"max_log_scale": "fp32"}),
    (
        mixture_rosenblatt_triton._inverse_kernel,
        {"D": 3, "BLOCK_K": 64},
        {"weight_ptr": "*fp64", "index_ptr": "*i32"},
    ),
]
for transform in (False, True):
    wide = dict.fromkeys(
        ("inverse_scale_ptr", "weight_ptr", "cdf_ptr", "sf_ptr"), "*fp64" if transform else "*fp32"
    )
    constants = VOCABULARY | {"COLUMNS": 4, "TRANSFORM": transform}
    KERNELS.append((mixture_rosenblatt_triton._sums_kernel, constants, wide))
    constants = VOCABULARY | {"GRAD_LOGITS": transform, "TRANSFORM": transform}
    KERNELS.append(
        (mixture_rosenblatt_triton._backward_kernel, constants, wide | {"is_lower_ptr": "*i8"})
    )


def main(architecture: int) -> None:
    target = GPUTarget("cuda", architecture, 32)
    for kernel, constants, types in KERNELS:
        signature = {}
        for name in kernel.arg_names:
            default = "*fp32" if name.endswith("_ptr") else "i32"
            signature[name] = "constexpr" if name in constants else types.get(name, default)

        compiled = triton.compile(ASTSource(kernel, signature, constants), target=target)
        print(kernel.__name__, constants, f"{len(compiled.asm['cubin'])} bytes")


if __name__ == "__main__":
    main(int(sys.argv[1]))
