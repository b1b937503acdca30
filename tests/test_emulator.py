"""The emulator reports each mistake of a kernel, and nothing where there is none."""

import ctypes
import functools
from pathlib import Path

import emulated as emulation
import pytest

HERE = Path(__file__).parent / "host"
NONE = ""
# Case of host/selftest*.cpp -> what its report says.
CASES = {
    "warp_exchange": NONE,
    "warp_exchange_without_syncwarp": "RACE",
    "atomic_histogram": NONE,
    "plain_histogram": "RACE",
    "named_barrier_pipeline": NONE,
    "pipeline_that_does_not_wait_for_empty": "RACE|DEADLOCK",
    "one_store_each": NONE,
    "two_threads_store_to_one_place": "already written by block 0 thread",
    "a_block_reads_what_it_stored": NONE,
    "a_block_reads_what_another_stored": "reads out+0, stored by block 0 of the same launch",
    "threads_may_exit_before_a_barrier": NONE,
    "warps_at_different_barriers": "DEADLOCK: 128 of 128 threads",
    "uninitialised_shared_memory": "reads uninitialised shared memory",
    "shared_store_inside": NONE,
    "shared_store_past_the_end": "shared write of 4 bytes at +512, block has 512 bytes",
    "global_load_inside": NONE,
    "global_load_past_the_end": "global read of 4 bytes at out+16384 is outside the buffer (size 16384)",
    "aligned_vectors": NONE,
    "misaligned_vector": "misaligned 16-byte load",
    "local_memory_of_another_thread": "accesses another thread's local memory",
    "shuffles_of_half_warps": NONE,
    "shuffle_from_a_lane_outside_the_mask": "which is not in the mask",
    "shuffle_in_a_divergent_branch": "threads wait in shuffle at selftest.cpp",
    "cp_async": NONE,
    "cp_async_read_before_the_wait": "bytes of an async copy",
    "cp_async_without_barrier": "RACE",
    "cp_async_never_waited_for": "exits with un-waited cp.async data",
    "ldmatrix_without_bank_conflicts": NONE,
    "ldmatrix_with_bank_conflicts": NONE,
    "strided_tensor_inside": NONE,
    "between_the_elements_of_a_tensor": "is between the elements of the tensor",
    "store_to_an_input": "writes read-only buffer 'rows'",
    "wgmma": NONE,
    "wgmma_without_proxy_fence": "written by thread 0 (warp 0 lane 0) without fence_proxy_async",
    "wgmma_without_fence": "the first wgmma of a group comes without wgmma_fence",
    "second_group_without_fence": "the first wgmma of a group comes without wgmma_fence",
    "wgmma_read_before_the_wait": "wrong by",
    "tma_gemm": NONE,
    "tma_without_full_wait": "bytes of an async copy",
    "tma_without_empty_wait": "RACE|too many arrivals|bytes of an async copy",
    "tma_expecting_too_few_bytes": "bytes of an async copy|wrong by|DEADLOCK",
    "stage_released_before_the_wait": "bytes of an async copy|RACE",
    "wgmma_waited_for_one_group_too_few": "bytes of an async copy|RACE",
    "descriptor_with_a_wrong_stride": "wrong by",
    "mbarrier_without_init_fence": "TMA signals an mbarrier without mbar_fence_init",
    "tma_store": NONE,
    "tma_store_without_proxy_fence": "TMA reads shared",
    "tma_store_whose_buffer_is_reused_too_early": "writes while the read by the async proxy is not ordered before it",
}


@functools.cache
def selftest() -> ctypes.CDLL:
    kernels = [(source, [*emulation.CHECKED, f"-I{HERE}"]) for source in sorted(HERE.glob("selftest*.cpp"))]
    library = ctypes.CDLL(str(emulation.link(emulation.runtime("check") + kernels, [], "selftest.so")))
    library.selftest_name.restype = ctypes.c_char_p
    return library


pytestmark = pytest.mark.skipif(emulation.why_not() is not None, reason=str(emulation.why_not()))


def run(case: str, schedule: str) -> tuple[int, str, int]:
    """Errors, reports and bank conflicts of a case."""
    text, conflicts = ctypes.create_string_buffer(8192), ctypes.c_uint64()
    order = ["forward", "reverse", "random"].index(schedule)
    errors = selftest().selftest_run(case.encode(), order, ctypes.c_uint64(7), text, len(text), ctypes.byref(conflicts))
    return errors, text.value.decode(), conflicts.value


def test_every_case_is_expected():
    names, i = [], 0
    while (name := selftest().selftest_name(i)) is not None:
        names.append(name.decode())
        i += 1
    assert sorted(names) == sorted(CASES)


@pytest.mark.parametrize("schedule", ["forward", "reverse", "random"])
@pytest.mark.parametrize("case", CASES)
def test_reports_exactly_the_mistakes(case, schedule):
    errors, text, _ = run(case, schedule)
    assert (errors > 0) == (CASES[case] != NONE), text
    assert any(expected in text for expected in CASES[case].split("|"))


def test_reports_name_the_line_of_both_accesses():
    _, text, _ = run("warp_exchange_without_syncwarp", "forward")
    line = next(i for i, s in enumerate((HERE / "selftest.cpp").read_text().splitlines(), 1) if "shared()[t ^ 1]" in s)
    assert f"at selftest.cpp:{line}" in text
    assert "other access at selftest.cpp:" in text


def test_counts_bank_conflicts():
    assert run("ldmatrix_without_bank_conflicts", "forward")[2] == 0
    assert run("ldmatrix_with_bank_conflicts", "forward")[2] == 4 * 7
