"""A test tool: executes on the CPU, in numpy, the PTX that nvcc makes of the CUDA kernels, and checks every access.

The kernels are compiled by `nvcc -ptx` (compiler.py), parsed (parser.py) and executed as a GPU would: grids of
blocks of warps of 32 lanes, the warps of a block in random order between barriers. An instruction that the tool
does not know is an error that names it.

    compiler.py      nvcc on kernels.cu: the text of the PTX, one for each type
    parser.py        text -> Kernel: parameters, shared memory, instructions with their lines of source
    memory.py        bytes with a shadow: what is allocated and written, who wrote and read last
    rounding.py      fma, bfloat16 and other roundings that numpy does not have
    arithmetic.py    what an opcode computes of its operands
    operands.py      registers, numbers and places, and what depends on registers that nobody wrote
    instructions.py  Instruction -> a function on the 32 lanes of a warp
    warp.py          registers and groups of lanes that stand at the same instruction
    grid.py          blocks, barriers, launches
    counts.py        `python -m ptx.counts`: what was executed and moved, to benchmarks/results/ptx_counts.json
    device.py        arrays in the memory of the device
    launches.py      the ops: which kernels with which parameters, as csrc/cuda/ launches them
    cases.py         shapes that reach each path, with their oracles in float64
    mutants.py       mistakes made in the text of the PTX, each of which a case must find

Found: accesses outside of what is allocated, misaligned ones, what depends on registers, shared or global memory
that nobody wrote, races of threads without a barrier between them, barriers in divergent code, shuffles with lanes
that are not there, divisions of integers by zero. Not modelled: caches and time, the 2 ulp of the hardware's
approximations (ex2, lg2, rcp are rounded results here), what ptxas makes of the PTX.
"""
