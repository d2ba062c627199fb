"""Common calls on arrays with missing pages, for docs/syscalls.md. Each is tried on a region of which the first block
is there and the rest is not: in user mode the kernel then meets a missing page in the middle of its work."""

import errno
import hashlib
import io
import os
import pickle
import socket
import threading
import zlib

import numpy as np

NBYTES = 1 << 20


class Short(Exception):
    """The call did less than it was asked to, and raised nothing."""


class LibraryMissing(Exception):
    """The call's library is not installed here."""


def expect_file(path, content):
    """Raise Short unless the file ends with content."""
    data = path.read_bytes()
    if len(data) < content.nbytes:
        raise Short
    assert content.tobytes() in data, f"{path}: wrong bytes"


def expect_count(count):
    if count != NBYTES:
        raise Short


def with_socket(function):
    """Call function(sender, receiver) on a pair of sockets; the receiver of a sender is drained by a thread."""
    left, right = socket.socketpair()
    with left, right:
        return function(left, right)


def drained(sender, receiver, send, content):
    received = bytearray()

    def drain():
        while piece := receiver.recv(1 << 16):
            received.extend(piece)

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        send(sender)
    finally:
        sender.shutdown(socket.SHUT_WR)
        thread.join()
    if len(received) < content.nbytes:
        raise Short
    assert bytes(received) == content.tobytes()


# ---- out of the array: f(array, content, path) ----

def np_save(array, content, path):
    np.save(path.with_suffix(".npy"), array)
    expect_file(path.with_suffix(".npy"), content)


def np_savez(array, content, path):
    np.savez(path.with_suffix(".npz"), array)
    with np.load(path.with_suffix(".npz")) as loaded:
        assert (loaded["arr_0"] == content).all()


def tofile(array, content, path):
    array.tofile(path)
    expect_file(path, content)


def file_write(array, content, path):
    with open(path, "wb") as file:
        expect_count(file.write(array))
    expect_file(path, content)


def file_write_unbuffered(array, content, path):
    with open(path, "wb", 0) as file:
        expect_count(file.write(array))
    expect_file(path, content)


def os_write(array, content, path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        expect_count(os.write(fd, array))
    finally:
        os.close(fd)
    expect_file(path, content)


def os_writev(array, content, path):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        expect_count(os.writev(fd, [array]))
    finally:
        os.close(fd)
    expect_file(path, content)


def pickle_dump_5(array, content, path):
    with open(path, "wb") as file:
        pickle.dump(array, file, protocol=5)
    expect_file(path, content)


def pickle_dumps(array, content, path):
    assert (pickle.loads(pickle.dumps(array)) == content).all()


def pickle_dumps_out_of_band(array, content, path):
    buffers = []
    pickled = pickle.dumps(array, protocol=5, buffer_callback=buffers.append)
    assert (pickle.loads(pickled, buffers=buffers) == content).all()


def bytes_io(array, content, path):
    file = io.BytesIO()
    expect_count(file.write(array))
    assert file.getvalue() == content.tobytes()


def zlib_compress(array, content, path):
    assert zlib.decompress(zlib.compress(array, 1)) == content.tobytes()


def sha256(array, content, path):
    assert hashlib.sha256(array).digest() == hashlib.sha256(content.tobytes()).digest()


def socket_sendall(array, content, path):
    with_socket(lambda left, right: drained(left, right, lambda sender: sender.sendall(array), content))


def socket_send(array, content, path):
    def send(sender):
        count = sender.send(array)
        sender.sendall(content[count:])  # as a program would that goes by the count
    with_socket(lambda left, right: drained(left, right, send, content))


def h5py_contiguous(array, content, path):
    h5py = imported("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=array)
    with h5py.File(path, "r") as file:
        assert (file["x"][:] == content).all()


def h5py_chunked(array, content, path):
    h5py = imported("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=array, chunks=(1 << 16,))
    with h5py.File(path, "r") as file:
        assert (file["x"][:] == content).all()


def safetensors_save(array, content, path):
    imported("safetensors.numpy").save_file({"x": array}, path)
    expect_file(path, content)


def zarr_save(array, content, path):
    zarr = imported("zarr")
    zarr.save(str(path), array)
    assert (zarr.load(str(path)) == content).all()


# ---- into the array: f(array, content, path); the file or peer has `content` ----

def readinto_buffered(array, content, path):
    path.write_bytes(content.tobytes())
    with open(path, "rb") as file:
        expect_count(file.readinto(array))


def readinto(array, content, path):
    path.write_bytes(content.tobytes())
    with open(path, "rb", 0) as file:
        expect_count(file.readinto(array))


def os_preadv(array, content, path):
    path.write_bytes(content.tobytes())
    fd = os.open(path, os.O_RDONLY)
    try:
        expect_count(os.preadv(fd, [array], 0))
    finally:
        os.close(fd)


def recv_into(array, content, path):
    def receive(left, right):
        sender = threading.Thread(target=lambda: (left.sendall(content), left.shutdown(socket.SHUT_WR)))
        sender.start()
        count = 0
        try:
            while piece := right.recv_into(memoryview(array)[count:]):
                count += piece
        except OSError:
            while right.recv(1 << 16):  # so that the sender ends
                pass
            raise
        finally:
            sender.join()
        expect_count(count)
    with_socket(receive)


def h5py_read_direct(array, content, path):
    h5py = imported("h5py")
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=content)
    with h5py.File(path, "r") as file:
        file["x"].read_direct(array)


def imported(name):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise LibraryMissing(name) from error


OUT = {
    "`np.save(path, a)`": np_save, "`np.savez(path, a)`": np_savez, "`a.tofile(path)`": tofile,
    '`open(path, "wb").write(a)`': file_write, '`open(path, "wb", 0).write(a)`': file_write_unbuffered,
    "`os.write(fd, a)`": os_write, "`os.writev(fd, [a])`": os_writev,
    "`pickle.dump(a, file, protocol=5)`": pickle_dump_5, "`pickle.dumps(a)`": pickle_dumps,
    "`pickle.dumps(a, protocol=5, buffer_callback=...)`": pickle_dumps_out_of_band, "`io.BytesIO().write(a)`": bytes_io,
    "`zlib.compress(a)`": zlib_compress, "`hashlib.sha256(a)`": sha256, "`socket.sendall(a)`": socket_sendall,
    "`socket.send(a)`, going by its count": socket_send, "h5py, contiguous dataset": h5py_contiguous,
    "h5py, chunked dataset": h5py_chunked, "`safetensors.numpy.save_file`": safetensors_save, "`zarr.save`": zarr_save,
}
INTO = {
    '`open(path, "rb").readinto(a)`': readinto_buffered, '`open(path, "rb", 0).readinto(a)`': readinto,
    "`os.preadv(fd, [a], 0)`": os_preadv, "`socket.recv_into(a)`": recv_into,
    "h5py, `dataset.read_direct(a)`": h5py_read_direct,
}


def outcome(function, array, content, path):
    """One of the words of the table."""
    try:
        function(array, content, path)
    except Short:
        return "**short, no error**"
    except LibraryMissing as error:
        return f"no {error}"
    except AssertionError:
        return "**wrong bytes**"
    except Exception as error:  # whatever a library makes of the kernel's EFAULT
        code = getattr(error, "errno", None)
        written = [file for file in path.parent.glob(path.name + "*") if file.is_file() and function in OUT.values()]
        left = ", leaves a short file" if any(file.stat().st_size < NBYTES for file in written) else ""
        name = type(error).__name__
        if code is None:
            return f"raises {name}{left}"
        return f"raises {name} ({errno.errorcode[code]}){left}"
    if function in INTO.values() and not (array == content).all():
        return "**wrong bytes**"
    return "works"
