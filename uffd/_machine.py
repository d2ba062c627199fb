"""What /proc, /sys and the environment tell about kernel, limits and confinement. Reads only; nothing raises."""

from __future__ import annotations

import os
import platform
import stat
import sys
from pathlib import Path

# gVisor answers one fixed build in place of the host's.
GVISOR_VERSION = "#1 SMP Sun Jan 10 15:06:54 PST 2016"
CAP_SYS_PTRACE = 19


class Machine:
    """`root` and `environ` are given by tests; None: the machine's own."""

    def __init__(self, root: str | os.PathLike[str] = "/", environ: dict[str, str] | None = None):
        self.root = Path(root)
        self.environ = os.environ if environ is None else environ

    def read(self, path: str) -> str | None:
        try:
            return (self.root / path.lstrip("/")).read_text(errors="replace").strip("\0\n ")
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        try:
            return (self.root / path.lstrip("/")).exists()
        except OSError:
            return False

    # Kernel

    @property
    def release(self) -> str:
        return self.read("/proc/sys/kernel/osrelease") or platform.release()

    @property
    def kernel(self) -> tuple[int, int]:
        """(6, 1) of "6.1.0-13-amd64"; (0, 0) if it can't be told."""
        parts = self.release.replace("-", ".").split(".")
        try:
            return int(parts[0]), int(parts[1])
        except (ValueError, IndexError):
            return 0, 0

    @property
    def unprivileged_sysctl(self) -> int | None:
        return _number(self.read("/proc/sys/vm/unprivileged_userfaultfd"))

    def device(self) -> str | None:
        """Mode, owner and group of /dev/userfaultfd, or None if there is none."""
        try:
            found = (self.root / "dev/userfaultfd").stat()
        except OSError:
            return None
        return f"{stat.S_IMODE(found.st_mode):04o} {_user(found.st_uid)}:{_group(found.st_gid)}"

    # Confinement

    def status(self, name: str) -> str | None:
        """A line of /proc/self/status."""
        for line in (self.read("/proc/self/status") or "").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        return None

    @property
    def seccomp(self) -> str | None:
        return {"0": "off", "1": "strict", "2": "filter"}.get(self.status("Seccomp") or "")

    @property
    def has_ptrace(self) -> bool:
        try:
            return bool(int(self.status("CapEff") or "0", 16) >> CAP_SYS_PTRACE & 1)
        except ValueError:
            return False

    @property
    def security_label(self) -> str | None:
        """SELinux' context or AppArmor's profile of this process."""
        return self.read("/proc/self/attr/current") or None

    @property
    def selinux_enforcing(self) -> bool:
        return self.read("/sys/fs/selinux/enforce") == "1"

    def surroundings(self) -> list[str]:
        """Of "gvisor", "wsl1", "wsl2", "kubernetes", "docker", "podman", "container": all that are seen."""
        found = []
        version = self.read("/proc/version") or ""
        if GVISOR_VERSION in version or "gvisor" in version.lower():
            found.append("gvisor")
        if "microsoft" in self.release.lower():
            found.append("wsl2" if "wsl2" in self.release.lower() or self.kernel >= (4, 19) else "wsl1")
        if "KUBERNETES_SERVICE_HOST" in self.environ or self.exists("/var/run/secrets/kubernetes.io"):
            found.append("kubernetes")
        if self.exists("/.dockerenv"):
            found.append("docker")
        elif self.exists("/run/.containerenv"):
            found.append("podman")
        elif self.environ.get("container") or self.exists("/run/systemd/container") or "kubernetes" in found:
            found.append("container")
        return found

    # Limits

    def cgroup_limit_bytes(self) -> int | None:
        """The smallest memory limit of our cgroup and those above it, or None."""
        limits = []
        for line in (self.read("/proc/self/cgroup") or "").splitlines():
            _, controllers, path = [*line.split(":", 2), "", ""][:3]
            if not controllers:
                limits += self._limits_above("/sys/fs/cgroup", path, "memory.max")
            elif "memory" in controllers.split(","):
                limits += self._limits_above("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes")
        # Version 1 has no word for 'none': it answers the largest number of whole pages.
        return min((limit for limit in limits if limit < 1 << 62), default=None)

    def _limits_above(self, mount: str, path: str, name: str) -> list[int]:
        # In a cgroup namespace the path is that of the host or "/", and the mount shows our own group at its top.
        parts = [part for part in path.split("/") if part]
        folders = [mount] + [mount + "/" + "/".join(parts[:n]) for n in range(1, len(parts) + 1)]
        values = (_number(self.read(f"{folder}/{name}")) for folder in folders)
        return [value for value in values if value is not None]

    def available_bytes(self) -> int | None:
        for line in (self.read("/proc/meminfo") or "").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return None

    def locked_bytes(self) -> int | None:
        """What mlock holds now: with mlockall(MCL_FUTURE) the kernel fills new regions before we can."""
        words = (self.status("VmLck") or "").split()
        return int(words[0]) * 1024 if words and words[0].isdigit() else None

    def chosen(self, path: str) -> str | None:
        """The word in brackets: "always [madvise] never" is madvise."""
        text = self.read(path)
        return text.partition("[")[2].partition("]")[0] or text if text else None

    def facts(self) -> dict[str, object]:
        """All of it, for the report: text, numbers, None for no limit or not to be told."""
        pages = "/sys/kernel/mm/transparent_hugepage"
        facts: dict[str, object] = {
            "system": platform.system() or sys.platform, "kernel": self.release, "processor": platform.machine(),
            "cpus": _cpus(), "page_bytes": _page_bytes(), "python": platform.python_version(),
        }
        if not sys.platform.startswith("linux"):
            return facts
        return facts | {
            "surroundings": self.surroundings() or ["none seen"],
            "unprivileged_userfaultfd": self.unprivileged_sysctl,
            "device": self.device() or "none",
            "cap_sys_ptrace": "yes" if self.has_ptrace else "no",
            "seccomp": self.seccomp,
            "security_label": self.security_label,
            "memlock_limit_bytes": _limit("RLIMIT_MEMLOCK"),
            "locked_bytes": self.locked_bytes(),
            "address_space_limit_bytes": _limit("RLIMIT_AS"),
            "open_files_limit": _limit("RLIMIT_NOFILE"),
            "cgroup_limit_bytes": self.cgroup_limit_bytes(),
            "available_bytes": self.available_bytes(),
            "thp": self.chosen(f"{pages}/enabled"),
            "thp_shared": self.chosen(f"{pages}/shmem_enabled"),
        }


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _limit(name: str) -> int | None:
    import resource

    soft, _ = resource.getrlimit(getattr(resource, name))
    return None if soft == resource.RLIM_INFINITY else soft


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _page_bytes() -> int | None:
    return os.sysconf("SC_PAGESIZE") if hasattr(os, "sysconf") else None


def _user(uid: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)


def _group(gid: int) -> str:
    try:
        import grp

        return grp.getgrgid(gid).gr_name
    except (ImportError, KeyError):
        return str(gid)
