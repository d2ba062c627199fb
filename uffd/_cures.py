"""For what a machine does not grant: what to do, fit for where it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ._machine import Machine

FOLDER = Path(__file__).resolve().parent / "cures"
WITHOUT = {  # feature -> (first kernel, what is lost without it)
    "SIGBUS": ("4.14", "no delivery inline"),
    "PAGEFAULT_FLAG_WP": ("5.7", "blocks that were read count as dirty"),
    "MISSING_SHMEM": ("4.11", "no backing 'shared'"),
    "MINOR_SHMEM": ("5.14", "backing 'shared' copies each block"),
    "WP_HUGETLBFS_SHMEM": ("5.19", "blocks of backing 'shared' that were read count as dirty"),
    "POISON": ("6.6", "a touch of a block whose fill failed ends in SIGSEGV, not in SIGBUS"),
}


def cures_for(machine: Machine, mode: str, errnos: dict[str, str | None], features: dict[str, bool],
              reason: str | None) -> list[str]:
    """What to do, one text per step. `errnos`: way -> errno's name or None if it was opened; empty without a core."""
    if not sys.platform.startswith("linux"):
        return ["Run on Linux: in WSL 2, a virtual machine or a container."]
    if not errnos:
        return [f"Reinstall the wheel for this platform: python -m pip install --force-reinstall pyuffd ({reason})"]
    cures = []
    if mode == "none":
        cures += _no_way_in(machine, errnos)
    elif mode == "user":
        cures += _full_mode(machine, errnos)
    cures += _kernel(machine, mode, features)
    if machine.locked_bytes():
        cures.append("This process holds locked memory. After mlockall(MCL_FUTURE) the kernel fills every new region "
                     "before uffd can, and making one is refused: lock what needs it with mlock() instead.")
    return cures


def _no_way_in(machine: Machine, errnos: dict[str, str | None]) -> list[str]:
    around = machine.surroundings()
    if "gvisor" in around:
        return ["gVisor has no userfaultfd: run this workload with runc (Docker: --runtime=runc; Kubernetes: another "
                "runtimeClassName)."]
    if "wsl1" in around:
        return ["WSL 1 has no userfaultfd: wsl --set-version DISTRIBUTION 2"]
    if errnos.get("syscall") == "ENOSYS":
        return [_wsl_kernel() if "wsl2" in around else
                "This kernel was built without CONFIG_USERFAULTFD (or a seccomp filter answers ENOSYS): take your "
                "distribution's kernel, or build one with CONFIG_USERFAULTFD=y."]
    # The kernel grants user mode to everybody since 5.11: a refusal there comes from a filter or a security module.
    if machine.kernel < (5, 11) and machine.seccomp != "filter":
        return [_sysctl()]
    return _confined(machine, errnos)


def _wsl_kernel() -> str:
    return ("This WSL 2 kernel has no userfaultfd: wsl --update, or build one with CONFIG_USERFAULTFD=y and name it as "
            "kernel= under [wsl2] in .wslconfig.")


def _confined(machine: Machine, errnos: dict[str, str | None]) -> list[str]:
    around = machine.surroundings()
    if machine.selinux_enforcing and "EACCES" in errnos.values() and machine.seccomp != "filter":
        return [_selinux()]
    if "kubernetes" in around:
        return [_kubernetes()]
    for engine in ("docker", "podman"):
        if engine in around:
            return [_device(engine), _profile(engine)]
    if around:
        return ["The container's seccomp profile denies userfaultfd: allow that one system call in it, or pass "
                "/dev/userfaultfd in."]
    return ["A filter denies the system call: under systemd add SystemCallFilter=userfaultfd to the unit; Flatpak, "
            "Snap and browsers' sandboxes can't be told to: run outside of them.",
            *([_selinux()] if machine.selinux_enforcing else [])]


def _device(engine: str) -> str:
    return (f"Pass the device in: {engine} run --device /dev/userfaultfd ... (host with Linux 6.1 or later; a user "
            "other than root in the container needs the host's udev rule as well). It gives the full mode, and no "
            "seccomp profile has to change.")


def _device_of_root(machine: Machine) -> str:
    return (f"The device is here, but not for this user ({machine.device()}): run as root in the container, or give "
            f"the device a group on the host ({FOLDER / '60-userfaultfd.rules'}) and add it: --group-add GROUP-ID.")


def _profile(engine: str) -> str:
    where = "/usr/share/containers/seccomp.json" if engine == "podman" else "profiles/seccomp/default.json of Moby"
    return (f"Or let the system call through: uffd probe --seccomp-profile BASE.json > uffd-seccomp.json, where "
            f"BASE.json is the profile in use ({where});\n"
            f"then {engine} run --security-opt seccomp=uffd-seccomp.json ... It gives user mode; with --cap-add "
            "SYS_PTRACE the full one.")


def _kubernetes() -> str:
    return (f"Kubernetes: see {FOLDER / 'pod.yaml'}: the device by a device plugin, or a Localhost seccomp profile "
            "that allows userfaultfd, made on each node by uffd probe --seccomp-profile BASE.json.")


def _selinux() -> str:
    return ("SELinux denies it; the log names the rule: ausearch -m avc -ts recent | audit2allow -M uffd && "
            "semodule -i uffd.pp. In a container: --security-opt label=type:TYPE with a type that has it.")


def _sysctl() -> str:
    return ("Allow it for every user of this machine: sudo sysctl -w vm.unprivileged_userfaultfd=1 (to stay: a line "
            "in /etc/sysctl.d/). Kernel faults held up by users have helped exploits: think of who else has access.")


def _full_mode(machine: Machine, errnos: dict[str, str | None]) -> list[str]:
    around = machine.surroundings()
    if "kubernetes" in around:
        return [_kubernetes()]
    engine = next((name for name in ("docker", "podman") if name in around), None)
    if engine:
        return [_device_of_root(machine) if machine.device() else _device(engine)]
    cures = []
    if machine.device():
        rule = FOLDER / "60-userfaultfd.rules"
        cures.append(
            "For the full mode, have root open the device to a group:\n"
            f"sudo groupadd -f --system userfaultfd && sudo usermod -aG userfaultfd \"$USER\" && sudo cp {rule} "
            "/etc/udev/rules.d/ &&\n"
            "sudo udevadm control --reload && sudo udevadm trigger --sysname-match=userfaultfd    # then log in anew")
        if machine.selinux_enforcing and errnos.get("device") == "EACCES":
            cures.append(_selinux())
    elif machine.kernel < (6, 1):
        cures.append("For the full mode: Linux 6.1 or later, which has /dev/userfaultfd. " + _sysctl())
    else:
        cures.append("For the full mode: /dev/userfaultfd is not in this container or chroot: pass it in.")
    if not cures[0].startswith("For the full mode: Linux"):
        cures.append("Or: " + _sysctl())
    return cures


def _kernel(machine: Machine, mode: str, features: dict[str, bool]) -> list[str]:
    if mode == "none":
        return []
    lost = [f"{name} (Linux {birth}): {loss}" for name, (birth, loss) in WITHOUT.items() if not features.get(name)]
    if not lost:
        return []
    return [f"Linux {machine.release} lacks, or was built without:\n" + "\n".join(lost) + "\nA newer kernel has them."]


def seccomp_profile(base: dict) -> dict:
    """A container engine's whole profile with userfaultfd allowed: `base` and cures/seccomp-userfaultfd.json."""
    entries = base.get("syscalls") if isinstance(base, dict) and "defaultAction" in base else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError("not a seccomp profile: it lacks 'defaultAction', or a list 'syscalls' of objects")
    ours = json.loads((FOLDER / "seccomp-userfaultfd.json").read_text())["syscalls"]
    allowed = {name for entry in ours for name in entry["names"]}
    kept = []
    for entry in entries:
        names = [name for name in entry.get("names", [entry.get("name")]) if name and name not in allowed]
        if names:  # two entries for one call would contradict each other
            kept.append({**{key: value for key, value in entry.items() if key != "name"}, "names": names})
    return {**base, "syscalls": kept + ours}
