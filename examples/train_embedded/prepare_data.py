"""Fetches animated emoji from npm (MIT licence) and packs the subjects of the grammar into one small zip."""

from __future__ import annotations

import argparse
import subprocess
import tarfile
from pathlib import Path

from sprites import SPRITE_SIZE, pack_sprites

PACKAGES = tuple(f"@lobehub/fluent-emoji-anim-{i}@1.0.0" for i in (1, 2, 3, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("data"), help="folder for the downloads (about 1 GB)")
    parser.add_argument("--out", type=Path, default=Path("data/sprites.zip"))
    parser.add_argument("--assets", type=Path, nargs="*", help="folders with *.webp already unpacked: no download")
    parser.add_argument("--size", type=int, default=SPRITE_SIZE, help="pixels of a sprite; 256 for large pictures")
    args = parser.parse_args()
    folders: list[Path] = args.assets or []
    if not folders:
        args.work.mkdir(parents=True, exist_ok=True)
        for package in PACKAGES:
            name = subprocess.run(
                ["npm", "pack", "--silent", package],
                cwd=args.work,
                check=True,
                capture_output=True,
                text=True,
            ).stdout.split()[-1]
            target = args.work / name.removesuffix(".tgz")
            with tarfile.open(args.work / name) as archive:
                archive.extractall(target, filter="data")
            folders.append(target / "package" / "assets")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    pack_sprites(folders, args.out, args.size)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
