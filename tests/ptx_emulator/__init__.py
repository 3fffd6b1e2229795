"""PTX that Triton generates, run on the CPU: a GPU of numpy arrays for machines without one.

What a GPU would execute is executed, instruction by instruction, for all threads of a block at once:
bfloat16, matrix instructions and their register layouts, asynchronous copies, tensor copies and their
swizzles. Copies land when the program waits for them, as late as a GPU may let them. What a GPU leaves
undefined is an error here: reading what is still in flight, overwriting what is still being read, exchanging
values between warps without a barrier or between blocks at all, addresses outside of every tensor.

Only what Triton emits for this package's kernels is known; anything else is refused by name. Instructions
run in the order of the text, so what ptxas and the chip make of it is not shown. Source: NVIDIA, "PTX ISA".
"""
