"""Touches that hold the GIL: native providers never need it, so none of them can deadlock."""

import pytest
from support.scripts import run_script

# Each expression is evaluated on a fresh region, whole of missing pages, by a thread that holds the GIL throughout.
EXPRESSIONS = ["a[0]", "a[-1]", "a[5 * BLOCK] + 0", "a.sum()", "a.max()", "a[:9999].tolist()", "repr(a)",
               "str(a[::999])", "pickle.dumps(a)", "a.tobytes()", "bytes(a[:300])", "a.copy()",
               "hash(a[7:99].tobytes())", "a.any()", "int(a[3 * BLOCK])", "list(a[::BLOCK])",
               "a.view('<f8')[1:99].min()", "np.array_equal(a, a)", "memoryview(a)[4 * BLOCK]",
               "a.view('S8')[3].hex()", "a.item(2 * BLOCK)"]
STORES = ["a[0] = 1", "a[BLOCK:BLOCK + 9] = 3", "a.fill(7)", "a[::BLOCK] += 1", "a.sort()"]

CODE = """
EXPRESSIONS = {expressions!r}
STORES = {stores!r}
content = pattern(0, 8 * BLOCK).copy()
with open("data", "wb") as file:
    file.write(content.tobytes())
makers = {{
    "zero": (lambda: providers.Zero(), np.zeros(8 * BLOCK, "u1")),
    "memory": (lambda: providers.Memory(content), content),
    "file": (lambda: providers.File("data"), content),
    "native": (lambda: controlled()[0], content),
}}
try:
    import blosc2
    schunk = blosc2.SChunk(chunksize=BLOCK, data=content, contiguous=True, urlpath="x.b2frame", mode="w",
                           cparams=dict(nthreads=1))
    del schunk
    makers["blosc2"] = (lambda: providers.Blosc2File("x.b2frame"), content)
except ImportError:
    pass
def same(left, right):
    if isinstance(left, np.ndarray) or isinstance(left, list):
        return np.array_equal(left, right)
    return left == right
for name, (maker, model) in makers.items():
    for text in EXPRESSIONS:
        with region(8 * BLOCK, maker()) as r:
            got = eval(text, globals() | {{"a": r.array()}})
            assert same(got, eval(text, globals() | {{"a": model.copy()}})), (name, text)
    for text in STORES:
        with region(8 * BLOCK, maker()) as r:
            a, right = r.array(), model.copy()
            exec(text, globals() | {{"a": a}})
            exec(text, globals() | {{"a": right}})
            assert (a == right).all(), (name, text)
            del a
    say(name)
"""


@pytest.mark.parametrize("user_mode", [False, True], ids=["full", "user"])
def test_touches_with_the_gil_held(where, user_mode):
    """Goal: no deadlock and the right value, for each native provider, backing and delivery. A deadlock shows as an
    overrun of the script's deadline."""
    code = CODE.format(expressions=EXPRESSIONS, stores=STORES)
    result = run_script(code, 40, where=where, user_mode=user_mode).check()
    assert result.stdout.split()[:4] == ["zero", "memory", "file", "native"]


def test_touch_while_other_threads_want_the_gil(where):
    """Goal: a thread that waits in a fault with the GIL held delays the others, and no more."""
    run_script("""
provider, control = controlled()
control.delay_us = 2000
r = region(100 * BLOCK, provider, readahead_bytes=0)
a = r.array()
turns = []
def spin():
    while len(turns) < 100000 and not stop:
        turns.append(1)
stop = False
threads = [threading.Thread(target=spin) for _ in range(3)]
for thread in threads:
    thread.start()
for block in range(100):
    assert a[block * BLOCK] == pattern(block * BLOCK, 1)[0]
stop = True
for thread in threads:
    thread.join()
""", where=where).check()


def test_calls_release_the_gil(where):
    """Goal: populate, prefetch().wait and pinned let other Python threads run while they wait."""
    run_script("""
for call in (lambda r: r.populate(), lambda r: r.prefetch().wait(), lambda r: r.pinned().__enter__()):
    provider, control = controlled()
    control.close_gate(0, BLOCK)
    r = region(BLOCK, provider)
    opener = threading.Timer(0.2, control.open_gate)  # runs only if the call releases the GIL
    opener.start()
    call(r)
    assert r.resident().all()
    opener.join()
""", where=where).check()
