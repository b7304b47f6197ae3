"""Every launch twice over a stub of the driver: by Triton's own C launcher, and by compiled.py.

Prints a line of JSON for each key of the table and for each case of launch_cases.py. Run by
test_launch_pairs.py in a process without the interpreter.

All of a launch is Triton's own but the compiler: binding of arguments, specialisation, cache key,
options, its C launcher, compiled here. In place of compiling, `shipped_kernel` checks that what is
asked for is the variant of the table, and hands over the binary that is shipped.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton as triton_package
from triton.compiler import CompiledKernel

from flowgrpo_kernels.aot import table
from flowgrpo_kernels.backends import compiled, dispatch, triton
from flowgrpo_kernels.backends.images import Manifest, launch_key
from measuring import stub_triton
from measuring.stub_driver import Stub
from support.kernels import launch_cases

# Cases that call a launcher themselves: below, with the launch that is compared.
OWN_LAUNCH = ("70000 blocks", "70000 blocks, 2 rows", "past 2^31")


class Pairs:
    """Launches by both, and what the stub notes of them."""

    def __init__(self, stub: Stub) -> None:
        self.stub, self.manifest = stub, Manifest()
        self.pack, self.variants = self.manifest.pack("sm_90a"), table.shipped()
        self.folder = Path(tempfile.mkdtemp())
        self.key, self.lines = "", []

    def launch(self, kernel, programs: int, tensors: tuple, numbers: tuple, **constants) -> None:
        """As compiled.launch; raises Unserved where it does."""
        self.key = launch_key(kernel, tensors, constants)
        compiled.launch(kernel, programs, tensors, numbers, **constants)
        triton.launch(kernel, programs, tensors, numbers, **constants)
        ours, theirs = self.stub.last(2)
        names = ("name", "image", "stream", "device", "grid", "block", "shared", "parameters")
        differ = [n for n in names if getattr(ours, n) != getattr(theirs, n)]
        binary = self.stub.digest(self.pack.image(self.key).binary) == ours.image
        self.lines.append({
            "key": self.key, "differ": differ, "shipped": binary, "grid": ours.grid,
            "name": ours.name, "bytes": len(ours.parameters),
        })  # fmt: skip

    def shipped_kernel(self, source, target, options, **unused) -> CompiledKernel:
        """In place of triton.compile: the shipped binary, where the table has just this variant."""
        variant = self.variants[self.key]
        names = source.fn.arg_names
        constants = {names[i]: value for (i,), value in source.constants.items()}
        divisible = {names[i] for (i,), hints in source.attrs.items() if hints}
        asked = dict(source.signature), constants, divisible, options["num_warps"]
        assert asked == (
            variant.types, variant.constants, set(variant.aligned), variant.options["num_warps"]
        ), (self.key, asked)  # fmt: skip
        assert options["enable_fp_fusion"] is False and target == stub_triton.TARGET
        image = self.pack.image(self.key)
        facts = {
            "target": vars(target), "name": image.entry, "num_warps": image.warps, "num_ctas": 1,
            "shared": image.shared, "global_scratch_size": 0, "global_scratch_align": 1,
            "profile_scratch_size": 0, "profile_scratch_align": 1, "tmem_size": 0,
            "launch_cooperative_grid": False, "launch_pdl": False, "tensordesc_meta": None,
        }  # fmt: skip
        number = len(list(self.folder.iterdir()))
        (self.folder / f"{number}.json").write_text(json.dumps(facts))
        (self.folder / f"{number}.cubin").write_bytes(image.binary)
        files = {f"k.{end}": str(self.folder / f"{number}.{end}") for end in ("json", "cubin")}
        return CompiledKernel(source, files, str(number))


def cases(pairs: Pairs) -> Iterator[tuple[str, object]]:
    """(name, call) of launch_cases.py, and of the whole grid of the table."""
    for i, call in enumerate(table.grid()):
        yield f"grid {i}", call
    for listed in (launch_cases.rollout_cases, launch_cases.loss_cases, launch_cases.nft_cases):
        for name, call in listed():
            # Rows of a table: the grid has the types that trainers give.
            if not name.startswith("transition_rows") and not name.endswith(OWN_LAUNCH):
                yield name, call
    for name, rows, elements in (
        ("sde_step 70000 blocks", 3, 70_000 * 4096),
        ("sde_step past 2^31", 2, (1 << 31) + 4096),
    ):
        yield name, launch_cases.unallocated(rows, elements, pairs.launch)


def main(library: str) -> None:
    torch.set_num_threads(1)
    stub = Stub(Path(library))
    with stub.tensors_of("cpu"):
        stub_triton.install(Path(library))
        pairs = Pairs(stub)
        triton_package.compiler.compile = pairs.shipped_kernel
        with dispatch.use_launch(pairs.launch):
            for name, call in cases(pairs):
                pairs.lines.clear()
                unserved = ""
                try:
                    call()
                except compiled.Unserved as error:
                    unserved = str(error)
                print(json.dumps({"case": name, "unserved": unserved, "launches": pairs.lines}))


if __name__ == "__main__":
    main(sys.argv[1])
