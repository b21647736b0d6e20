"""Runs the compiled kernels of every ISA against the scalar ones, bit for bit.

    python tools/emulate_avx512.py [BUILD]            on an emulated AVX-512 machine (Bochs)
    python tools/emulate_avx512.py [BUILD] --native   on this CPU, with the ISAs that it has

BUILD is the directory with the module's object files (default: build). The same objects that go
into the module are linked with tests/emulated. See docs/guides/avx512-without-hardware.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "tests" / "emulated"
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
BARE = [
    *("-ffreestanding", "-fno-exceptions", "-fno-rtti", "-fno-stack-protector", "-fno-pic"),
    *("-mno-red-zone", "-fno-threadsafe-statics", "-fno-asynchronous-unwind-tables"),
    *("-nostdlib", "-static", "-Wl,-z,noexecstack", "-Wl,--build-id=none"),
    "-Wl,--no-warn-rwx-segments",  # one segment for all is what a loader of old wants
]
# What boots the program; all of it is in Debian.
BOOT_FILES = {
    "isolinux.bin": "/usr/lib/ISOLINUX",
    "ldlinux.c32": "/usr/lib/syslinux/modules/bios",
    "libcom32.c32": "/usr/lib/syslinux/modules/bios",
    "mboot.c32": "/usr/lib/syslinux/modules/bios",
}
BIOS = ["/usr/share/bochs/BIOS-bochs-latest", "/usr/share/bochs/VGABIOS-lgpl-latest"]
PACKAGES = "bochs bochsbios vgabios xorriso isolinux syslinux-common binutils g++"
TALK = re.compile(r"^(tables:|not run:|\S+: \d+ compared|DIFFERS|INVALID|FAULT)")
END = re.compile(r"^(\d+) passed, (\d+) failed")

BOCHSRC = """\
config_interface: textconfig
display_library: rfb, options="timeout=0"
memory: guest=256, host=256
romimage: file={bios}
vgaromimage: file={vga}
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=boot.iso, status=inserted
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
cpu: model={cpu}, count=1, ips=10000000, reset_on_triple_fault=0
clock: sync=none
port_e9_hack: enabled=1
"""


def fail(message: str, hint: str) -> SystemExit:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return SystemExit(1)


def objects(build: Path, names: list[str]) -> list[str]:
    """The newest object file of each source."""
    found = []
    for name in names:
        places = sorted(build.rglob(f"{name}.o"), key=lambda path: path.stat().st_mtime)
        if not places:
            raise fail(f"no object file {name}.o under {build}", "build first: make demo")
        found.append(str(places[-1]))
    return found


def kernels(build: Path) -> list[str]:
    return objects(
        build,
        [f"isa/{isa}{part}.cpp" for isa in ("scalar", "avx2", "avx512") for part in ("", "_kv")],
    )


def tiles(build: Path) -> list[str]:
    return objects(build, [f"isa/{isa}.cpp" for isa in ("amx", "amx_emulated")])


def compile_native(build: Path, folder: Path) -> Path:
    out = folder / "isa_equality"
    sources = [str(SOURCES / name) for name in ("isa_equality.cpp", "hosted.cpp")]
    core = objects(
        build, [f"core/{name}.cpp" for name in ("formats", "kv", "rows", "cpu", "dispatch")]
    )
    command = [compiler(), *FLAGS, *sources, *kernels(build), *tiles(build), *core]
    subprocess.run([*command, "-o", str(out)], check=True)
    return out


def compile_bare(build: Path, folder: Path) -> Path:
    """An ELF that a multiboot loader takes: 64-bit code in a 32-bit file."""
    long, out = folder / "long.elf", folder / "test.elf"
    sources = [str(SOURCES / name) for name in ("boot.S", "isa_equality.cpp", "bare.cpp")]
    core = objects(build, ["core/formats.cpp", "core/kv.cpp", "core/rows.cpp"])
    script = ["-T", str(SOURCES / "bare.ld")]
    command = [compiler(), *FLAGS, *BARE, *script, *sources, *kernels(build), *core]
    subprocess.run([*command, "-lgcc", "-o", str(long)], check=True)
    subprocess.run(["objcopy", "-O", "elf32-i386", str(long), str(out)], check=True)
    return out


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def check_programs() -> None:
    missing = [name for name in ("bochs", "xorriso", "objcopy") if not shutil.which(name)]
    files = [f"{folder}/{name}" for name, folder in BOOT_FILES.items()] + BIOS
    missing += [path for path in files if not Path(path).exists()]
    if missing:
        raise fail(f"missing: {', '.join(missing)}", f"apt-get install {PACKAGES}")


def make_disc(program: Path, folder: Path) -> None:
    place = folder / "disc" / "isolinux"
    place.mkdir(parents=True)
    for name, origin in BOOT_FILES.items():
        shutil.copy(f"{origin}/{name}", place)
    shutil.copy(program, place.parent)
    config = "default test\nprompt 0\nlabel test\n kernel mboot.c32\n append /test.elf\n"
    (place / "isolinux.cfg").write_text(config)
    boot = "-b isolinux/isolinux.bin -c isolinux/boot.cat -no-emul-boot -boot-load-size 4"
    command = ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(folder / "boot.iso")]
    subprocess.run([*command, *boot.split(), "-boot-info-table", str(place.parent)], check=True)


def emulate(folder: Path, cpu: str) -> Iterator[str]:
    """Lines that the emulated machine prints, until it switches itself off."""
    (folder / "bochsrc").write_text(BOCHSRC.format(bios=BIOS[0], vga=BIOS[1], cpu=cpu))
    process = subprocess.Popen(
        ["bochs", "-q", "-f", "bochsrc"],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write("c\n")  # Debian's build starts in its debugger
        process.stdin.flush()
        yield from process.stdout
    finally:
        process.kill()
        process.wait()


def run(lines: Iterator[str]) -> int:
    """Shows what the test says. Exit status: 0 only if it came to its end without a difference."""
    for line in lines:
        if TALK.match(line):
            print(line, end="", flush=True)
        if end := END.match(line):
            print(line, end="")
            return int(end[1] == "0" or end[2] != "0")
    print("the test did not come to its end", file=sys.stderr)
    return 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("build", nargs="?", type=Path, default=ROOT / "build")
    parser.add_argument("--native", action="store_true", help="run on this CPU, not in Bochs")
    parser.add_argument("--cpu", default="corei7_icelake_u", help="Bochs CPU model")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.native:
            program = compile_native(args.build, folder)
            out = subprocess.run([str(program)], capture_output=True, text=True, check=False)
            return run(iter(out.stdout.splitlines(keepends=True)))
        check_programs()
        make_disc(compile_bare(args.build, folder), folder)
        return run(emulate(folder, args.cpu))


if __name__ == "__main__":
    sys.exit(main())
