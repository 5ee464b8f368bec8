"""How lists of tensors are cut into chunks, and what kernels may believe of where these lie."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.offline.ttir import Operation, read
from kernels.tensor_list import CHUNK, chunk_table

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
BYTES = {"f32": 4, "bf16": 2, "i16": 2}


@pytest.mark.parametrize(
    "sizes", [(), (0,), (1,), (CHUNK,), (0, CHUNK + 1, 0, 7, 3 * CHUNK, 5 * CHUNK - 1, 0)], ids=str
)
def test_chunks_cover_every_number_once_and_in_order(sizes: tuple[int, ...]) -> None:
    numbers = [(tensor, place) for tensor, size in enumerate(sizes) for place in range(size)]
    covered = 0
    for tensor, start, length, place in chunk_table(sizes, CPU).tolist():
        assert start % CHUNK == 0 and 0 < length <= CHUNK and place == covered
        assert numbers[place] == (tensor, start) and numbers[place + length - 1] == (tensor, start + length - 1)
        covered += length
    assert covered == len(numbers)


def test_chunks_of_tensors_beyond_32_bits_are_found() -> None:
    size = 2**32 + 5
    assert chunk_table((size, size), CPU)[-1].tolist() == [1, 2**32, 5, size + 2**32]


@pytest.fixture(scope="module")
def kernels() -> list[Operation]:
    """AdamW with bf16 gradients, with shadows and in halves, and the gradient norm in fp32 and bf16."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compiled_updates"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [read(text) for text in json.loads(done.stdout)]


def accesses(kernel: Operation) -> Iterator[tuple[int, int, bool]]:
    """Bytes of a number, bytes that its block's pointer is promised to be aligned to, and whether it is masked."""
    made = {result: op for op in kernel.walk() for result in op.results}
    for op in kernel.walk():
        if op.name in ("tt.load", "tt.store") and ": tensor<" in op.text:
            source = made[op.values[0]]
            while source.name != "tt.int_to_ptr":
                source = made[source.values[0]]
            promised = int(source.text.split("tt.divisibility = dense<")[1].split(">")[0])
            number = BYTES[source.text.split("!tt.ptr<")[1].rstrip(">")]
            yield number, promised, len(op.values) > (1 if op.name == "tt.load" else 2)


def test_whole_blocks_are_promised_to_be_aligned_and_others_only_to_their_numbers(kernels: list[Operation]) -> None:
    """Only a GPU minds: there a promise that is not kept ends the run, and one that is not made costs speed."""
    update, halves, *norms = ([*accesses(kernel)] for kernel in kernels)

    def four_numbers_an_access(of_4_bytes: int, of_2_bytes: int) -> list[tuple[int, int, bool]]:
        whole = [*[(4, 16, False)] * of_4_bytes, *[(2, 8, False)] * of_2_bytes]
        return sorted([*whole, *((number, number, True) for number, _, _ in whole)])

    # Read and written: three lists in fp32; read or written: gradients and shadows in bf16.
    assert sorted(update) == four_numbers_an_access(6, 2)
    # Read and written: moments in fp32, params and remainders; read: gradients.
    assert sorted(halves) == four_numbers_an_access(4, 5)
    assert norms == [[(4, 16, False), (4, 4, True)], [(2, 16, False), (2, 2, True)]]
