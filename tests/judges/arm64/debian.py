"""
What the guest is made of: Debian packages of another architecture, and Python packages for it.

Nothing of this host is touched. apt works on lists and a cache of its own, with an empty status file, so that asking
for a package brings exactly what it depends on; the packages are unpacked, not installed. No root is needed.

All is kept in one folder for each architecture, named after the recipe: a changed recipe makes a new one. Packages
that came out since are fetched when the folder is removed, and not before, so a run needs no network once it is there.
The kernel and the packages with their versions are in ``packages.txt``.
"""

from __future__ import annotations

import compileall
import hashlib
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from tests.judges.arm64.cpio import Archive

SUITE: Final = "bookworm"  # Debian 12: the first with a Python that hwbpd runs on, and a kernel that counts lost hits
MIRROR: Final = "http://deb.debian.org/debian"
KEYRING: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
PYTHON: Final = (3, 11)  # of that Debian

BUSYBOX: Final = (
    "sh",
    "mount",
    "mkdir",
    "ifconfig",
    "poweroff",
    "dmesg",
    "cat",
    "ls",
    "kill",
    "ps",
    "sleep",
    "timeout",
)
# No program of the guest needs these; together they are half of what the packages bring.
LEFT_OUT: Final = (
    "usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/lintian", "usr/share/bug",
    "usr/share/i18n", "usr/share/perl5", "usr/share/zoneinfo", "var", "boot", "lib/modules", "usr/share/python3",
    *(f"usr/lib/python3.11/{name}" for name in ("test", "lib2to3", "idlelib", "turtledemo", "ensurepip", "pydoc_data")),
)  # fmt: skip
LEFT_OUT_NAMES: Final = ("gconv",)  # wherever they lie
NOT_FOR_THE_GUEST: Final = ("mypy", "ruff")  # they look at files, which are the same there

INIT: Final = b"""#!/bin/sh
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /run
ifconfig lo 127.0.0.1 up
# Debian's kernel refuses everybody but root; this is what the kernel comes with.
echo 2 > /proc/sys/kernel/perf_event_paranoid
echo guest: up
/bin/sh /extra/run
echo guest: status $?
poweroff -f
"""

PASSWD: Final = b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
GROUP: Final = b"root:x:0:\nnogroup:x:65534:\n"


class Missing(Exception):
    """This host lacks something; the sentence says what, and how to get it."""


class Recipe(Struct, frozen=True):
    """A guest: its architecture as Debian names it, and where its kernel and programs come from."""

    architecture: str
    kernel: str  # the package that depends on the newest kernel
    packages: tuple[str, ...]
    wheels: tuple[str, ...]  # platforms whose wheels fit it, as pip names them; none: it does without


ARM64: Final = Recipe(
    "arm64",
    "linux-image-cloud-arm64",
    ("python3", "busybox-static", "libatomic1", "libstdc++6"),
    ("manylinux2014_aarch64", "manylinux_2_17_aarch64", "manylinux_2_28_aarch64"),
)
ARMHF: Final = Recipe("armhf", "linux-image-armmp", ("python3-minimal", "libpython3-stdlib", "busybox-static"), ())


class Guest(Struct, frozen=True):
    """What QEMU needs to start one, and what is known of it."""

    kernel: Path
    base: Path  # an archive; further ones are put behind it
    versions: str  # of its kernel and Python


def provide(recipe: Recipe, cache: Path) -> Guest:
    """
    Return the guest of a recipe, made if it is not in the cache yet; that takes half a minute and 40 MB of downloads.

    :raises Missing: when a tool is, or the packages cannot be had.
    """
    wheels = python_packages() if recipe.wheels else ()
    made_of = repr((recipe, wheels, SUITE, BUSYBOX, LEFT_OUT, LEFT_OUT_NAMES, INIT, PASSWD, sys.version_info[:2]))
    folder = cache / f"{recipe.architecture}-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}"
    guest = Guest(folder / "kernel", folder / "base.cpio", "")
    if not (folder / "packages.txt").exists():
        for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
            if shutil.which(tool) is None:
                raise Missing(f"{tool} is needed to fetch Debian packages; on Debian and Ubuntu it is in {package}")
        if not KEYRING.exists():
            raise Missing(f"{KEYRING} is needed to check Debian packages: apt-get install debian-archive-keyring")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=cache) as making:
            _make(recipe, wheels, Path(making))
            shutil.rmtree(folder, ignore_errors=True)
            Path(making, "made").rename(folder)
    versions = (folder / "packages.txt").read_text().split("\n", 1)[0]
    return Guest(guest.kernel, guest.base, versions)


def python_packages() -> tuple[str, ...]:
    """What hwbpd and its tests need of Python packages, by pyproject.toml."""
    project = tomllib.loads((root() / "pyproject.toml").read_text())["project"]
    wanted = (*project["dependencies"], *project["optional-dependencies"]["dev"])
    return tuple(one for one in wanted if not one.startswith(NOT_FOR_THE_GUEST))


def root() -> Path:
    """Where the tree lies."""
    return Path(__file__).resolve().parents[3]


def _make(recipe: Recipe, wheels: Sequence[str], work: Path) -> None:
    made, tree, site = work / "made", work / "tree", work / "site"
    for folder in (made, tree, site):
        folder.mkdir()
    _tell(f"fetching Debian {SUITE} packages for {recipe.architecture}")
    debs = _fetch(recipe, work)
    image = next(deb for deb in debs if deb.name.startswith("linux-image-"))
    for deb in debs:
        into = work / "kernel" if deb is image else tree
        _run(["dpkg-deb", "--extract", str(deb), str(into)], "dpkg-deb")
    shutil.copy(next((work / "kernel" / "boot").glob("vmlinuz-*")), made / "kernel")
    if recipe.wheels:
        _tell("fetching Python packages for it")
        platforms = [f"--platform={platform}" for platform in recipe.wheels]
        version = f"--python-version={PYTHON[0]}.{PYTHON[1]}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        pip += ["--target", str(site), version, *platforms, "--only-binary=:all:", *wheels]
        _run(pip, "pip")
    for folder in (tree / "usr/lib/python3.11", tree / "usr/lib/python3", site):
        compile_tree(folder)
    with (made / "base.cpio").open("wb") as file:
        _write_base(Archive(file), tree, site)
    versions = sorted(deb.name.removesuffix(".deb").replace("%3a", ":") for deb in debs)
    python = next(name for name in versions if name.startswith("python3.11-minimal_")).split("_")[1]
    newest = image.name.split("_")
    (made / "packages.txt").write_text("\n".join([f"{newest[0]} {newest[1]}, python {python}", *versions]) + "\n")


def _fetch(recipe: Recipe, work: Path) -> list[Path]:
    """Download the kernel and the programs with all they depend on; return the package files."""
    apt = work / "apt"
    for below in ("state/lists/partial", "cache/archives/partial", "etc/parts"):
        (apt / below).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "etc/sources.list").write_text(f"deb [signed-by={KEYRING}] {MIRROR} {SUITE} main\n")
    settings = {
        "APT::Architecture": recipe.architecture,
        "APT::Architectures": recipe.architecture,
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",  # or it would want to become a user that cannot write here
        "Acquire::Languages": "none",
        "Dir::State": f"{apt}/state",
        "Dir::State::status": f"{apt}/status",
        "Dir::Cache": f"{apt}/cache",
        "Dir::Etc::sourcelist": f"{apt}/etc/sources.list",
        "Dir::Etc::sourceparts": f"{apt}/etc/parts",
        "Dir::Etc::preferencesparts": f"{apt}/etc/parts",
        "Debug::NoLocking": "true",
    }
    configuration = apt / "apt.conf"
    configuration.write_text("".join(f'{name} "{value}";\n' for name, value in settings.items()))
    environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}
    _run(["apt-get", "update", "-qq"], "apt-get", environment)
    # Whole programs with what they need; of the kernel only itself, as its tools would build another root file system.
    _run(["apt-get", "install", "-qq", "-y", "--download-only", *recipe.packages], "apt-get", environment)
    depends = _run(["apt-cache", "depends", recipe.kernel], "apt-cache", environment)
    kernel = next(line.split()[-1] for line in depends.splitlines() if "Depends: linux-image-" in line)
    archives = apt / "cache/archives"
    _run(["apt-get", "download", "-qq", kernel], "apt-get", environment, cwd=archives)
    return sorted(archives.glob("*.deb"))


def _write_base(archive: Archive, tree: Path, site: Path) -> None:
    # Debian's lib, bin and sbin are links into usr here, as its own merge makes them.
    usr = tree / "usr"
    for name in ("bin", "sbin", "lib"):
        if (tree / name).is_dir() and not (tree / name).is_symlink():
            shutil.copytree(tree / name, usr / name, symlinks=True, dirs_exist_ok=True)
            shutil.rmtree(tree / name)
            (tree / name).symlink_to(f"usr/{name}")
    for name in BUSYBOX:
        if not (usr / "bin" / name).exists():
            (usr / "bin" / name).symlink_to("busybox")
    archive.add_tree(tree, "", lambda path: str(path) not in LEFT_OUT and path.name not in LEFT_OUT_NAMES)
    archive.add_tree(site, "site", lambda path: path.name != "bin")
    archive.add_file("init", INIT, executable=True)
    archive.add_file("etc/passwd", PASSWD)
    archive.add_file("etc/group", GROUP)
    for name in ("proc", "sys", "dev", "tmp", "run", "root"):
        archive.add_directory(name)
    archive.close()


def compile_tree(folder: Path) -> None:
    """Compile Python files for the guest, where compiling is fifty times slower, if this Python is of its version."""
    if sys.version_info[:2] == PYTHON and folder.exists():
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        compileall.compile_dir(folder, quiet=2, invalidation_mode=mode, stripdir=str(folder))


def _run(command: Sequence[str], tool: str, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise Missing(f"{tool} failed, and this needs the network once: {said[-1]}")
    return done.stdout


def _tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
