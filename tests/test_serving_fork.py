"""Engine.serve and fork: the socket is the parent's alone, whoever dies first."""

from support.scripts import run_script


def test_a_forked_child_neither_answers_nor_removes():
    """Goal: the path is the parent's: a child has none of its descriptors, exits without a trace, may serve at a path
    of its own; and when the parent is killed, nobody is there, though the child lives."""
    run_script("""
import socket
engine = uffd.Engine(workers=1)
served = engine.serve("s")
held = socket.socket(socket.AF_UNIX)
held.connect("s")
wait_until(lambda: served._connections, "not accepted")
def sockets():
    return [target for target in leaks.read_fds().values() if "socket" in target]
before = len(sockets())
pid = os.fork()
if not pid:
    assert served.closed
    assert len(sockets()) == before - 2, sockets()  # the listener, and the server's end of the connection
    served.close()
    engine.serve("child").close()
    engine.close()
    sys.exit(0)
assert wait_for_child(pid) == 0
assert os.path.lexists("s") and not served.closed
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(5)
    client.connect("s")
    client.sendall(b"GET /stats HTTP/1.0\\r\\n\\r\\n")
    assert client.recv(100).startswith(b"HTTP/1.0 200")
""").check()


def test_a_child_that_outlives_its_parent():
    run_script("""
import socket
reader, writer = os.pipe()
middle = os.fork()
if not middle:
    engine = uffd.Engine(workers=1)
    engine.serve("s")
    child = os.fork()
    if not child:
        os.write(writer, b"x")
        time.sleep(30)
        os._exit(0)
    time.sleep(30)
assert os.read(reader, 1) == b"x"
os.kill(middle, signal.SIGKILL)
assert wait_for_child(middle) == -signal.SIGKILL
with socket.socket(socket.AF_UNIX) as client:
    try:
        client.connect("s")
    except ConnectionRefusedError:
        say("dead")
with uffd.Engine(workers=1) as engine:
    engine.serve("s")
""").check()


def test_a_child_forked_by_a_busy_parent():
    """Goal: forks at any moment of the server's threads leave a child that works. Method: clients ask meanwhile."""
    run_script("""
import socket
engine = uffd.Engine(workers=1)
r = region(16 * BLOCK, controlled()[0], engine=engine)
engine.serve("s")
stop = threading.Event()
def ask():
    while not stop.is_set():
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect("s")
            client.sendall(b"GET /stats HTTP/1.0\\r\\n\\r\\n")
            assert client.recv(100).startswith(b"HTTP/1.0 200")
threads = [threading.Thread(target=ask) for _ in range(3)]
for thread in threads:
    thread.start()
def child():
    engine.serve(f"child {os.getpid()}").close()
    assert checked(r.address, 0, 16 * BLOCK) is None
for _ in range(20):
    assert in_child(child) == 0
stop.set()
for thread in threads:
    thread.join()
assert os.path.lexists("s")
""", 30).check()
