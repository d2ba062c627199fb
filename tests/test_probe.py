"""uffd.probe(): what it finds here, what it says on machines that are made up, and that nothing makes it raise."""

import errno
import importlib
import json
import os
import subprocess
import sys
import types

import pytest
import uffd

probe_module = importlib.import_module("uffd.probe")
cures_module = importlib.import_module("uffd._cures")
Machine = importlib.import_module("uffd._machine").Machine

ALL_BITS = (1 << 17) - 1


def run_uffd(*words, **options):
    return subprocess.run([sys.executable, "-m", "uffd", *words], capture_output=True, text=True, timeout=60,
                          check=False, **options)


def machine_of(tmp_path, files=None, environ=None):
    """A Machine whose /proc and /sys are these files."""
    for name, text in (files or {}).items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Machine(tmp_path, environ or {})


# Here


@pytest.fixture(scope="module")
def found():
    return uffd.probe()


def test_the_mode_is_that_of_the_first_way_that_opens(found):
    opened = [way.name for way in found.ways if way.opened]
    expected = "none" if not opened else "user" if opened == ["syscall-user"] else "full"
    assert found.mode == expected
    assert found.kernel_faults == (expected == "full")
    assert [way.name for way in found.ways] == ["device", "syscall", "syscall-user"]
    assert all(way.opened == (way.errno_name is None) for way in found.ways)


def test_a_user_without_privilege_and_root_get_what_the_kernel_grants_them(found):
    if not found.ways or found.ways[2].errno_name in ("ENOSYS", "EPERM", "EACCES"):
        pytest.skip(f"no user mode here: {found.reason}")
    machine = Machine()
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK) or machine.has_ptrace or machine.unprivileged_sysctl:
        assert found.mode == "full"
    else:
        assert found.mode == "user"


def test_every_delivery_is_tested_with_real_faults(found):
    if found.mode == "none":
        pytest.skip(f"no userfaultfd here: {found.reason}")
    assert [test.delivery for test in found.self_test] == ["thread", "inline"]
    for test in found.self_test:
        assert test.ok, test.error
        # A touch of memory that is there takes some 50 ns: less than this would be no fault at all.
        assert 500 < test.median_ns <= test.p99_ns < 10**9


def test_features_go_by_the_kernel_version(found):
    kernel = Machine().kernel
    if found.mode == "none":
        pytest.skip(f"no userfaultfd here: {found.reason}")
    for name, (birth, _) in probe_module.FEATURES.items():
        if found.features[name]:
            # Distributions carry features back into older kernels, but none comes before 4.11.
            assert kernel >= (4, 11), name
        elif name in ("SIGBUS", "THREAD_ID", "EVENT_UNMAP"):  # these depend on no option of the build
            assert kernel < tuple(map(int, birth.split("."))), name


def test_the_report_names_every_feature_way_and_cure(found):
    report = str(found)
    for word in [*found.features, *(way.name for way in found.ways), f"mode: {found.mode}"]:
        assert word in report
    for cure in found.cures:
        assert cure.splitlines()[0] in report
    assert max(map(len, report.splitlines())) < 400


def test_the_command_prints_the_same_as_json(found):
    done = run_uffd("probe", "--json")
    assert done.returncode == (0 if found.mode != "none" else 1), done.stderr
    printed = json.loads(done.stdout)
    assert printed["mode"] == found.mode
    assert printed["features"] == found.features
    assert printed["feature_kernels"]["MOVE"] == "6.8"
    assert printed["page_bytes"] == os.sysconf("SC_PAGESIZE")


def test_the_command_prints_the_report(found):
    done = run_uffd("probe", "--no-self-test")
    assert f"mode: {found.mode}" in done.stdout
    assert "self-test" not in done.stdout


# Machines that are made up


class FakeCore(types.SimpleNamespace):
    FEATURES = {name: 1 << bit for bit, name in enumerate(probe_module.FEATURES)}

    def try_open(self, way):
        return self.answers[way], ALL_BITS if self.answers[way] >= 0 else 0, 0


def probe_with(monkeypatch, **answers):
    answers = {name.replace("_", "-"): answer for name, answer in answers.items()}
    monkeypatch.setattr(probe_module, "_load_core", lambda: (FakeCore(answers=answers), None))
    return uffd.probe(self_test=False)


@pytest.mark.parametrize("refusal", [errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOSYS])
def test_each_way_is_tried_after_any_refusal(monkeypatch, refusal):
    found = probe_with(monkeypatch, device=-refusal, syscall=-refusal, syscall_user=3)
    assert (found.mode, found.kernel_faults) == ("user", False)
    assert found.ways[0].errno_name == errno.errorcode[refusal]
    assert probe_with(monkeypatch, device=-refusal, syscall=3, syscall_user=3).mode == "full"
    nothing = probe_with(monkeypatch, device=-refusal, syscall=-refusal, syscall_user=-refusal)
    assert nothing.mode == "none"
    assert nothing.cures
    assert errno.errorcode[refusal] in nothing.reason


def test_user_mode_says_what_it_costs(monkeypatch):
    found = probe_with(monkeypatch, device=-errno.EACCES, syscall=-errno.EPERM, syscall_user=3)
    assert "EFAULT" in str(found)
    assert "uffd.pinned" in str(found)


def test_without_the_extension_it_answers_none(monkeypatch):
    monkeypatch.setattr(probe_module, "_load_core", lambda: (None, "the extension can't be loaded: no reason"))
    found = uffd.probe()
    assert (found.mode, found.ways, found.self_test) == ("none", (), ())
    assert "reinstall" in found.cures[0].lower()
    assert "can't be loaded" in str(found)
    assert not any(found.features[name] for name in probe_module.FEATURES)


def test_elsewhere_than_on_linux_it_answers_none(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    found = uffd.probe()
    assert found.mode == "none"
    assert "Linux" in found.reason
    assert "Linux" in found.cures[0]
    json.dumps(found.as_dict())
    assert str(found)


def test_a_core_that_raises_is_a_way_that_fails(monkeypatch):
    def broken(way):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(probe_module, "_load_core", lambda: (types.SimpleNamespace(try_open=broken, FEATURES={}), None))
    found = uffd.probe()
    assert [way.errno_name for way in found.ways] == ["EMFILE"] * 3


@pytest.mark.parametrize(("child", "word"), [
    ("import time; time.sleep(60)", "no end within"),
    ("import os; os.abort()", "exit code -6"),
    ("raise SystemExit('page 3 holds 0, not 166')", "page 3 holds 0"),
    ("print('no JSON')", ""),
], ids=["hangs", "dies", "zeros", "garbage"])
def test_a_self_test_that_fails_is_told_in_time(monkeypatch, child, word):
    monkeypatch.setattr(probe_module, "_CHILD", child)
    monkeypatch.setattr(probe_module, "SELF_TEST_DEADLINE_S", 1.5)
    test = probe_module._self_test("thread", {"SIGBUS": True})
    assert not test.ok
    assert word in test.error
    assert test.median_ns is None


DENIED = {"device": "ENOENT", "syscall": "EPERM", "syscall-user": "EPERM"}
USER = {"device": "EACCES", "syscall": "EPERM", "syscall-user": None}
NEW = {"proc/sys/kernel/osrelease": "6.8.0-generic", "proc/self/status": "Seccomp:\t2\nCapEff:\t0000000000000000\n"}
PLACES = [
    # name, files, environment, errno of each way, mode, what the cures must and must not say
    ("desktop", {**NEW, "dev/userfaultfd": ""}, {}, USER, "user",
     ["60-userfaultfd.rules", "udevadm", "sysctl"], ["docker"]),
    ("old desktop", {"proc/sys/kernel/osrelease": "5.15.0"}, {}, {**USER, "device": "ENOENT"}, "user",
     ["vm.unprivileged_userfaultfd=1", "6.1"], ["docker", "udev"]),
    ("kernel without user mode", {"proc/sys/kernel/osrelease": "5.4.0", "proc/self/status": "Seccomp:\t0\n"}, {},
     {**DENIED, "syscall-user": "EINVAL"}, "none", ["vm.unprivileged_userfaultfd=1"], ["docker"]),
    ("docker", {**NEW, ".dockerenv": ""}, {}, DENIED, "none",
     ["docker run --device /dev/userfaultfd", "--seccomp-profile", "SYS_PTRACE"], ["udevadm"]),
    ("docker in user mode", {**NEW, ".dockerenv": ""}, {}, {**USER, "device": "ENOENT"}, "user",
     ["docker run --device /dev/userfaultfd"], ["sysctl"]),
    ("docker with a device of root's", {**NEW, ".dockerenv": "", "dev/userfaultfd": ""}, {}, USER, "user",
     ["run as root in the container", "--group-add"], ["sysctl", "--device"]),
    ("podman", {**NEW, "run/.containerenv": ""}, {}, DENIED, "none",
     ["podman run --device", "/usr/share/containers/seccomp.json"], ["docker"]),
    ("kubernetes", {**NEW, ".dockerenv": ""}, {"KUBERNETES_SERVICE_HOST": "x"}, DENIED, "none",
     ["pod.yaml", "Localhost"], ["docker run"]),
    ("gvisor", {**NEW, "proc/version": "Linux version 4.4.0 #1 SMP Sun Jan 10 15:06:54 PST 2016"}, {},
     dict.fromkeys(DENIED, "ENOSYS"), "none", ["gVisor", "runc"], ["seccomp"]),
    ("wsl 1", {"proc/sys/kernel/osrelease": "4.4.0-19041-Microsoft"}, {}, dict.fromkeys(DENIED, "ENOSYS"), "none",
     ["wsl --set-version"], ["docker"]),
    ("wsl 2", {"proc/sys/kernel/osrelease": "5.15.90.1-microsoft-standard-WSL2"}, {},
     dict.fromkeys(DENIED, "ENOSYS"), "none", [".wslconfig", "CONFIG_USERFAULTFD"], ["docker"]),
    ("no such call", NEW, {}, {"device": "ENOENT", "syscall": "ENOSYS", "syscall-user": "ENOSYS"}, "none",
     ["CONFIG_USERFAULTFD=y"], ["docker"]),
    ("selinux", {**NEW, "sys/fs/selinux/enforce": "1", "proc/self/status": "Seccomp:\t0\n"}, {},
     dict.fromkeys(DENIED, "EACCES"), "none", ["audit2allow"], ["docker"]),
    ("systemd", NEW, {}, DENIED, "none", ["SystemCallFilter"], ["docker"]),
]


@pytest.mark.parametrize(("files", "environ", "errnos", "mode", "says", "says_not"), [place[1:] for place in PLACES],
                         ids=[place[0].replace(" ", "-") for place in PLACES])
def test_the_cure_fits_the_place(tmp_path, files, environ, errnos, mode, says, says_not):
    features = dict.fromkeys([*probe_module.FEATURES, *probe_module.KERNEL_EXTRAS], True)
    text = "\n".join(cures_module.cures_for(machine_of(tmp_path, files, environ), mode, errnos, features, None))
    for word in says:
        assert word in text
    for word in says_not:
        assert word not in text


def test_full_mode_with_every_feature_needs_no_cure(tmp_path):
    features = dict.fromkeys(probe_module.FEATURES, True)
    assert cures_module.cures_for(machine_of(tmp_path, NEW), "full", dict.fromkeys(DENIED), features, None) == []


def test_a_feature_that_lacks_is_named_with_its_kernel(tmp_path):
    features = dict.fromkeys(probe_module.FEATURES, True) | {"POISON": False}
    (cure,) = cures_module.cures_for(machine_of(tmp_path, NEW), "full", dict.fromkeys(DENIED), features, None)
    assert "POISON (Linux 6.6)" in cure
    assert "SIGBUS (" not in cure


def test_locked_memory_is_told(tmp_path):
    machine = machine_of(tmp_path, {**NEW, "proc/self/status": "VmLck:\t  1024 kB\n"})
    features = dict.fromkeys(probe_module.FEATURES, True)
    assert "MCL_FUTURE" in cures_module.cures_for(machine, "full", dict.fromkeys(DENIED), features, None)[0]


def test_an_empty_machine_raises_nothing(tmp_path):
    """Without /proc and /sys every fact is 'not to be told'."""
    facts = machine_of(tmp_path).facts()
    assert facts["cgroup_limit_bytes"] is None
    assert facts["seccomp"] is None
    assert facts["device"] == "none"


CGROUPS = [
    ("v2", {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "1048576\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n"}, 1 << 20),
    ("v2 in a namespace", {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4194304\n"}, 1 << 22),
    ("v1", {"proc/self/cgroup": "5:cpu:/x\n3:memory:/x\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2097152\n"}, 1 << 21),
    ("none", {"proc/self/cgroup": "0::/\n"}, None),
]


@pytest.mark.parametrize(("files", "limit"), [case[1:] for case in CGROUPS], ids=[case[0] for case in CGROUPS])
def test_the_memory_limit_is_the_smallest_up_the_tree(tmp_path, files, limit):
    assert machine_of(tmp_path, files).cgroup_limit_bytes() == limit


# Files of the project


BASE = {
    "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [
        {"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["userfaultfd", "vm86"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1},
        {"name": "userfaultfd", "action": "SCMP_ACT_ERRNO"},
    ],
}


def test_a_seccomp_profile_gets_the_call_and_keeps_all_else(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps(BASE))
    done = run_uffd("probe", "--seccomp-profile", str(tmp_path / "base.json"))
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert {**made, "syscalls": None} == {**BASE, "syscalls": None}
    assert [entry["action"] for entry in made["syscalls"] if "userfaultfd" in entry["names"]] == ["SCMP_ACT_ALLOW"]
    assert [entry["names"] for entry in made["syscalls"]] == [["read", "write"], ["vm86"], ["userfaultfd"]]


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"defaultAction": "x"}',
                                  '{"defaultAction": "x", "syscalls": [3]}'])
def test_what_is_no_profile_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "base.json").write_text(text)
    done = run_uffd("probe", "--seccomp-profile", str(tmp_path / "base.json"))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert "base.json" in line and "Docker's default" in line


@pytest.mark.parametrize(("words", "named"), [
    ((), ["probe", "pack", "snapshot", "migrate", "demo"]),
    (("store",), ["ls", "rm"]),
    (("snapshot",), ["info", "verify", "export", "diff"]),
    (("migrate", "away"), ["demo"]),
    (("top", "--now", "x"), ["PATH", "--interval"]),
    (("migrate", "demo", "--mib", "much"), ["--mib", "--seconds"]),
], ids=" ".join)
def test_wrong_usage_is_answered_by_all_there_is(words, named):
    """Goal: who mistypes a command sees what it takes, and exit code 2."""
    done = run_uffd(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "error: " in done.stderr.splitlines()[-1]
    assert [name for name in named if name not in done.stderr] == []


def test_the_pod_is_what_kubernetes_takes():
    text = (cures_module.FOLDER / "pod.yaml").read_text()
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: the pod is only looked for")
    pod = yaml.safe_load(text)
    assert (pod["apiVersion"], pod["kind"]) == ("v1", "Pod")
    assert pod["spec"]["containers"][0]["securityContext"]["seccompProfile"]["type"] == "Localhost"


def test_the_udev_rule_comes_before_access_is_given():
    rule = cures_module.FOLDER / "60-userfaultfd.rules"
    (line,) = [line for line in rule.read_text().splitlines() if not line.startswith("#")]
    assert 'KERNEL=="userfaultfd"' in line
    assert 'MODE="0660"' in line
    assert int(rule.name[:2]) < 73
