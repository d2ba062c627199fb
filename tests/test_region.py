"""Regions as memory: the right bytes whatever dtype, shape, place and access; life and death; refusals."""

import gc
import os
import pickle
import threading

import numpy as np
import pytest
import uffd
from support import leaks, matrix
from support.native import controlled
from support.pattern import pattern, seeded
from uffd import providers

PAGE = uffd._core.PAGE_BYTES
BLOCK = 65536
NBYTES = 10 * BLOCK


def filled(make, nbytes=NBYTES, **options):
    provider, control = controlled()
    return make(nbytes, provider, **options), control


# ---- content ----

@pytest.mark.parametrize("dtype", ["u1", "<i2", ">u4", "<f8", "<c16", "S7", "?", [("a", "<u4"), ("b", "<f4")]], ids=str)
def test_dtype(make, dtype):
    """Goal: an array of each dtype has the provider's bytes. Method: compare with numpy's view of the same bytes."""
    region, _ = filled(make)
    dtype = np.dtype(dtype)
    count = NBYTES // dtype.itemsize
    array = region.array(dtype, (count,))
    assert array.dtype == dtype and array.flags.aligned and array.flags.writeable
    assert array.tobytes() == pattern(0, count * dtype.itemsize).tobytes()
    del array


@pytest.mark.parametrize("shape", [(), (1,), 7, (3, 5), (2, 3, 4, 5), (0,), (4, 0, 2)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("offset", [0, 8, PAGE, BLOCK - 8])
def test_shape_order_offset(make, shape, order, offset):
    """Goal: shape, order and offset are numpy's. Method: the same view over a plain buffer."""
    region, _ = filled(make)
    array = region.array("<u8", shape, offset=offset, order=order)
    right = np.ndarray(shape, "<u8", pattern(0, NBYTES), offset=offset, order=order)
    assert array.shape == right.shape and array.strides == right.strides
    assert type(array) is np.ndarray
    np.testing.assert_array_equal(array, right)
    assert array.size == 0 or array.ctypes.data == region.address + offset
    del array


def test_default_array_is_the_whole_region(make):
    region, _ = filled(make, NBYTES + 3)
    array = region.array()
    assert array.dtype == np.uint8 and array.shape == (NBYTES + 3,)
    np.testing.assert_array_equal(array, pattern(0, NBYTES + 3))
    words = region.array("<u8", offset=16)  # the shape left out: as many as fit
    assert words.shape == ((NBYTES + 3 - 16) // 8,)
    del array, words


@pytest.mark.parametrize("block_bytes", [PAGE, 4 * PAGE, 65536, 1 << 20])
@pytest.mark.parametrize("extra", [1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE + 17])
def test_odd_sizes(make, block_bytes, extra):
    """Goal: a last block that is not whole is filled to its last byte, and no provider is asked past the end."""
    nbytes = 2 * block_bytes + extra
    provider, control = controlled()
    control.nbytes_max = nbytes
    region = make(nbytes, provider, block_bytes=block_bytes)
    assert region.nbytes == nbytes and region.block_bytes == block_bytes
    array = region.array()
    assert array[nbytes - 1] == pattern(nbytes - 1, 1)[0]
    np.testing.assert_array_equal(array, pattern(0, nbytes))
    del array


@pytest.mark.parametrize("nbytes", [1, 2, PAGE - 1, PAGE, PAGE + 1])
def test_small_regions(make, nbytes):
    provider, control = controlled()
    control.nbytes_max = nbytes
    array = make(nbytes, provider).array()
    np.testing.assert_array_equal(array, pattern(0, nbytes))
    del array


@pytest.mark.parametrize("step", [-1, -PAGE, PAGE + 1, 3 * BLOCK, -7 * PAGE])
def test_page_order(make, step):
    """Goal: touches backward, with strides and across block edges see the right bytes."""
    region, _ = filled(make, block_bytes=4 * PAGE)
    array = region.array()
    np.testing.assert_array_equal(array[::step], pattern(0, NBYTES)[::step])
    del array


def test_writes_stay_and_leave_the_source_alone(make):
    """Goal: mode c is private. Method: write over blocks before and after their fill, look at the source."""
    source = pattern(0, NBYTES).copy()
    region = make(None, providers.Memory(source))
    assert region.nbytes == NBYTES and region.mode == "c"
    array = region.array()
    right = source.copy()
    for start in (5, PAGE - 3, BLOCK - 100, 3 * BLOCK, NBYTES - 9):  # a write is the first touch of its block
        array[start:start + 9] = right[start:start + 9] = 7
    np.testing.assert_array_equal(array, right)
    array[::PAGE] += 1  # a write to blocks that are there
    right[::PAGE] += 1
    np.testing.assert_array_equal(array, right)
    np.testing.assert_array_equal(source, pattern(0, NBYTES))
    del array


def test_mode_r_is_read_only(make):
    region, _ = filled(make, mode="r")
    array = region.array()
    assert not array.flags.writeable and region.mode == "r"
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    np.testing.assert_array_equal(array, pattern(0, NBYTES))
    del array


def test_two_arrays_of_one_region_share_memory(make):
    region, control = filled(make)
    first, second = region.array(), region.array("<u4", offset=BLOCK)
    first[BLOCK:BLOCK + 4] = (1, 2, 3, 4)
    assert second[0] == 0x04030201
    assert np.shares_memory(first, second)
    del first, second


@pytest.mark.parametrize("threads", [2, 8])
def test_one_fill_per_block_whoever_asks(make, threads):
    """Goal: threads that touch the same blocks at once see the right bytes, and each block is filled once."""
    provider, control = controlled()
    blocks = 64
    counts = control.count_blocks(blocks * BLOCK, BLOCK)
    control.delay_us = 200
    region = make(blocks * BLOCK, provider, readahead_bytes=0)
    array = region.array()
    rng = seeded("one fill per block")
    orders = [rng.sample(range(blocks), blocks) for _ in range(threads)]
    wrong = []

    def touch(order):
        for block in order:
            start = block * BLOCK
            if not np.array_equal(array[start:start + BLOCK], pattern(start, BLOCK)):
                wrong.append(start)

    workers = [threading.Thread(target=touch, args=(order,)) for order in orders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert counts.tolist() == [1] * blocks
    assert control.overlaps == 0
    del array


def test_resident_and_dirty_are_exact(make):
    """Goal: a read makes a block resident, a write makes it dirty, nothing else does."""
    region, _ = filled(make, readahead_bytes=0)
    array = region.array()
    assert not region.resident().any() and not region.dirty().any()
    array[0], array[5 * BLOCK + 9]
    assert np.flatnonzero(region.resident()).tolist() == [0, 5]
    assert not region.dirty().any()
    array[5 * BLOCK] = 3  # a write to a block that was read
    array[8 * BLOCK] = 3  # a write as first touch
    assert np.flatnonzero(region.resident()).tolist() == [0, 5, 8]
    assert np.flatnonzero(region.dirty()).tolist() == [5, 8]
    assert region.dirty().dtype == bool and region.dirty().shape == (NBYTES // BLOCK,)
    del array


# ---- making ----

def test_from_provider_keeps_everything_alive(where):
    """Goal: the array alone holds region, engine and provider; the last view's end unmaps."""
    source = pattern(0, NBYTES).copy()
    array = uffd.from_provider(providers.Memory(source), (NBYTES // 16, 2), "<u8", **where.options)
    gc.collect()
    view = array[3:, 1:].T
    address = array.ctypes.data
    del array
    gc.collect()
    np.testing.assert_array_equal(view, source.view("<u8").reshape(-1, 2)[3:, 1:].T)
    assert uffd.region_of(view).address == address
    del view


def test_from_provider_offset_and_order(where):
    source = pattern(0, NBYTES).copy()
    array = uffd.from_provider(providers.Memory(source), (5, 7), "<i4", offset=PAGE + 4, order="F", **where.options)
    np.testing.assert_array_equal(array, np.ndarray((5, 7), "<i4", source, PAGE + 4, order="F"))
    del array


def test_region_of(make):
    region, _ = filled(make)
    array = region.array("<u4")
    for ours in (array, array[5:], array[::-3], array.reshape(-1, 4).T, array.view("u1")[77:], array[10:10]):
        assert uffd.region_of(ours) is region
    plain = np.zeros(10)
    with pytest.raises(ValueError):
        uffd.region_of(plain)
    with pytest.raises(ValueError):
        uffd.region_of(array + 1)
    memory = np.frombuffer(memoryview(array.view("u1"))[PAGE:], "u1")
    assert uffd.region_of(memory) is region
    del array, ours, memory


def test_attributes(engine, where):
    region = uffd.Region(NBYTES, providers.Zero(), engine=engine, name="weights", **where.options)
    assert region.name == "weights" and region.engine is engine and not region.closed
    assert region.address % PAGE == 0 and region.nbytes == NBYTES and region.block_bytes == BLOCK
    assert region in list(engine.regions)
    assert "weights" in repr(region)
    region.close()
    assert region.closed
    assert region not in list(engine.regions)


def test_default_engine_is_one():
    assert uffd.default_engine() is uffd.default_engine()
    region = uffd.Region(PAGE, providers.Zero())
    assert region.engine is uffd.default_engine()
    region.close()


def test_huge_region_costs_nothing_until_touched(make):
    """Goal: 1 TiB is made and closed with next to no memory, and is right at both ends."""
    nbytes = 1 << 40
    provider, _ = controlled()
    before = leaks.rss_bytes()
    region = make(nbytes, provider)
    assert leaks.rss_bytes() - before < 8 << 20
    array = region.array()
    for offset in (0, nbytes // 2 + 13, nbytes - 1):
        assert array[offset] == pattern(offset, 1)[0]
    assert leaks.rss_bytes() - before < 32 << 20
    del array
    region.close()


@pytest.mark.parametrize("options, error", [
    ({"block_bytes": PAGE + 1}, ValueError), ({"block_bytes": 3 * PAGE}, ValueError), ({"block_bytes": 0}, ValueError),
    ({"block_bytes": PAGE // 2}, ValueError), ({"block_bytes": -PAGE}, (ValueError, OverflowError)),
    ({"backing": "paper"}, ValueError), ({"delivery": "pigeon"}, ValueError), ({"on_error": "ignore"}, ValueError),
    ({"mode": "w"}, ValueError), ({"retries": -1}, (ValueError, OverflowError)), ({"timeout_s": -1}, ValueError),
    ({"timeout_s": float("nan")}, ValueError), ({"readahead_bytes": -1}, (ValueError, OverflowError)),
    ({"nbytes": 0}, ValueError), ({"nbytes": -5}, (ValueError, OverflowError)), ({"nbytes": "many"}, TypeError),
    ({"nbytes": 1.5}, TypeError), ({"provider": 17}, TypeError), ({"engine": "fast"}, TypeError),
    ({"nbytes": 1 << 62}, (ValueError, OverflowError, MemoryError, OSError)),
], ids=str)
def test_refused_options(engine, options, error):
    """Goal: each senseless option is refused by name when the region is made, and leaves nothing behind."""
    arguments = {"nbytes": NBYTES, "provider": providers.Zero(), "engine": engine, **options}
    with pytest.raises(error) as caught:
        uffd.Region(arguments.pop("nbytes"), arguments.pop("provider"), **arguments)
    assert str(caught.value)
    assert not list(engine.regions)


def test_size_larger_than_the_provider(make):
    with pytest.raises(ValueError):
        make(NBYTES + 1, providers.Memory(bytes(NBYTES)))


def test_size_unknown(make):
    provider, _ = controlled()
    with pytest.raises((ValueError, TypeError)):
        make(None, provider)


@pytest.mark.parametrize("arguments, options, error", [
    (("O",), {}, TypeError), (([("a", "O")],), {}, TypeError), (("u1", NBYTES + 1), {}, (ValueError, TypeError)),
    (("<u8", (3,)), {"offset": NBYTES - 16}, (ValueError, TypeError)),
    (("u1",), {"offset": -1}, (ValueError, OverflowError)),
    (("u1",), {"offset": NBYTES + 1}, ValueError), (("u1", (-1,)), {}, ValueError),
    (("u1", (5,)), {"order": "Q"}, ValueError),
    (("u1", (1 << 40, 1 << 40)), {}, ValueError), (("no such dtype",), {}, TypeError),
], ids=str)
def test_refused_arrays(make, arguments, options, error):
    region, _ = filled(make)
    with pytest.raises(error):
        region.array(*arguments, **options)
    region.close()  # nothing was exported


# ---- closing ----

def test_close_refuses_while_arrays_live(make):
    """Goal: close with a live view raises BufferError and harms nothing; without, it closes, and twice is fine."""
    region, _ = filled(make)
    array = region.array()
    view = array[PAGE:]
    del array
    with pytest.raises(BufferError):
        region.close()
    assert not region.closed
    np.testing.assert_array_equal(view, pattern(PAGE, NBYTES - PAGE))
    del view
    region.close()
    region.close()
    assert region.closed


def test_closed_region_says_so(make):
    region, _ = filled(make)
    region.close()
    for method in (region.array, region.populate, region.prefetch, region.resident, region.dirty):
        with pytest.raises(uffd.RegionClosed):
            method()
    assert issubclass(uffd.RegionClosed, ValueError) and issubclass(uffd.RegionClosed, uffd.UffdError)


def test_context_manager_with_live_array(engine, where):
    """Goal: leaving the block never raises BufferError; the memory stays until the last array dies."""
    provider, _ = controlled()
    with uffd.Region(NBYTES, provider, engine=engine, **where.options) as region:
        array = region.array()
        address = region.address
    np.testing.assert_array_equal(array, pattern(0, NBYTES))
    with pytest.raises(uffd.RegionClosed):
        region.array()
    assert leaks.mapping_of(address)
    del array, region
    gc.collect()


def test_context_manager_keeps_the_programs_exception(engine, where):
    provider, _ = controlled()
    with pytest.raises(ZeroDivisionError):
        with uffd.Region(NBYTES, provider, engine=engine, **where.options) as region:
            array = region.array()
            array[0] + 1 // 0
    del array


def test_engine_context_manager_with_live_array(where):
    provider, _ = controlled()
    with uffd.Engine(workers=1) as engine:
        array = uffd.Region(NBYTES, provider, engine=engine, **where.options).array()
    np.testing.assert_array_equal(array, pattern(0, NBYTES))
    del array


def test_engine_close_refuses_while_arrays_live(where):
    provider, _ = controlled()
    engine = uffd.Engine(workers=1)
    array = uffd.Region(NBYTES, provider, engine=engine, **where.options).array()
    with pytest.raises(BufferError):
        engine.close()
    np.testing.assert_array_equal(array, pattern(0, NBYTES))
    del array
    engine.close()
    engine.close()
    with pytest.raises((uffd.UffdError, ValueError)):
        uffd.Region(NBYTES, provider, engine=engine)


def test_reference_cycle_is_collected(engine, where):
    class Holder:
        pass

    holder = Holder()
    provider, _ = controlled()
    holder.region = uffd.Region(NBYTES, provider, engine=engine, **where.options)
    holder.array, holder.me = holder.region.array(), holder
    holder.array[0]
    del holder
    gc.collect()


@pytest.mark.deadline(90)
def test_many_regions_leave_nothing(engine, where):
    """Goal: 200 regions made, touched and closed three times over leave no fd, thread or mapping."""
    provider, _ = controlled()
    for _ in range(3):
        regions = [uffd.Region(2 * BLOCK, provider, engine=engine, **where.options) for _ in range(200)]
        arrays = [region.array() for region in regions]
        for array in arrays:
            assert array[BLOCK] == pattern(BLOCK, 1)[0]
        del array, arrays
        for region in regions:
            region.close()
        before = leaks.take()
    after = leaks.take()
    assert abs(after.mappings - before.mappings) <= 4


def test_pickled_region_is_its_recipe(tmp_path, where):
    """Goal: a pickled region has provider and options, no bytes of memory; what was written stays behind."""
    path = tmp_path / "data"
    path.write_bytes(pattern(0, NBYTES).tobytes())
    with uffd.Region(None, providers.File(path), name="n", block_bytes=4 * PAGE, **where.options) as region:
        region.array()[:PAGE] = 0
        recipe = pickle.dumps(region)
    assert len(recipe) < 2000
    with pickle.loads(recipe) as again:
        assert (again.nbytes, again.name, again.block_bytes) == (NBYTES, "n", 4 * PAGE)
        np.testing.assert_array_equal(again.array(), pattern(0, NBYTES))


def test_close_against_touching_threads(where):
    """Goal: leaving a region under threads that still touch is safe: they hold arrays, they see right bytes."""
    for _ in range(20):
        provider, control = controlled()
        control.delay_us = 100
        wrong = []

        def touch(array):
            if not np.array_equal(array, pattern(0, NBYTES)):
                wrong.append(True)

        with uffd.Engine(workers=2) as engine:
            with uffd.Region(NBYTES, provider, engine=engine, **where.options) as region:
                threads = [threading.Thread(target=touch, args=(region.array(),)) for _ in range(3)]
                for thread in threads:
                    thread.start()
        for thread in threads:
            thread.join()
        del thread, threads
        gc.collect()
        assert not wrong


def test_auto_delivery():
    """Goal: auto delivery serves the kernel's own accesses wherever that can be had. Method: write(2) of a region."""
    reader, writer = os.pipe()
    with uffd.Region(PAGE, providers.Memory(pattern(0, PAGE).copy())) as region:
        array = region.array()
        if matrix.full_mode():
            assert os.write(writer, array) == PAGE
            assert os.read(reader, PAGE) == pattern(0, PAGE).tobytes()
        else:
            with pytest.raises(OSError):
                os.write(writer, array)
        del array
    os.close(reader)
    os.close(writer)


def test_many_sizes_at_random(make):
    """Goal: random geometry, random touches, against a plain array."""
    rng = seeded("many sizes")
    for _ in range(25):
        block_bytes = PAGE << rng.randrange(6)
        nbytes = rng.randrange(1, 20 * block_bytes)
        region, _ = filled(make, nbytes, block_bytes=block_bytes, readahead_bytes=rng.choice([None, 0, block_bytes]))
        array, model = region.array(), pattern(0, nbytes).copy()
        for _ in range(30):
            start = rng.randrange(nbytes)
            stop = rng.randrange(start, min(nbytes, start + 3 * block_bytes)) + 1
            if rng.random() < 0.4:
                array[start:stop] = model[start:stop] = rng.randrange(256)
            else:
                np.testing.assert_array_equal(array[start:stop], model[start:stop])
        np.testing.assert_array_equal(array, model)
        del array
        region.close()


def test_descriptors_are_not_inherited(make):
    """Goal: no userfaultfd, memfd or eventfd of ours survives exec."""
    region, _ = filled(make)
    for fd, target in leaks.read_fds().items():
        if "userfaultfd" in target or "memfd" in target or "eventfd" in target or "eventpoll" in target:
            assert not os.get_inheritable(fd), target
    region.close()
