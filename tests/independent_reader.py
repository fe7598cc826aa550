#!/usr/bin/env python3
"""Reads a Highwater repository by docs/format.md alone, without Highwater.

  independent_reader.py REPO [--passphrase-file F | --key-file F] list | restore POINT DISK OUTFILE
POINT is a prefix of a point's id. OUTFILE, which must not exist, becomes a sparse raw
image. All is verified; on damage one line says what, the status is 1, and no OUTFILE
stays. Needs the modules argon2-cffi, blake3, cryptography, lz4 and zstandard.
"""
import argparse
import json
import re
import sys
from functools import cached_property, lru_cache
from pathlib import Path
from struct import error as StructError, pack, unpack_from

import argon2.low_level
import lz4.block
import zstandard
from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CHUNKS, PAGES = 1, 2


class Damage(Exception):
    """Not as the format says."""


def need(claim, reason):
    if not claim:
        raise Damage(reason)


def derive(context, material):
    return blake3(material, derive_key_context=context).digest()


def decompress(codec, payload, length, what):
    try:
        if codec == 1:
            need(zstandard.frame_content_size(payload) <= length, f"{what}: too long")
            payload = zstandard.ZstdDecompressor().decompress(
                payload, max_output_size=max(length, 1), allow_extra_data=False)
        elif codec == 2:
            payload = lz4.block.decompress(payload, uncompressed_size=length)
    except (zstandard.ZstdError, lz4.block.LZ4BlockError) as error:
        raise Damage(f"{what}: {error}") from None
    need(codec <= 2 and len(payload) == length, f"{what}: bad codec or length")
    return payload


class Repository:
    def __init__(self, root, passphrase, key_file):
        self.root = Path(root)
        config = self.load("config")
        line, *rest = config.split(b"\n")
        need(rest == [blake3(line).hexdigest().encode(), b""], "config: its hash is another")
        self.config = json.loads(line)
        need((self.config["format"], self.config["version"]) == ("highwater", 1)
             and not self.config["features_incompat"], "config: unknown format")
        need(self.config["chunk_bytes"] in [1 << n for n in range(16, 23)], "config: chunk_bytes")
        self.cipher = ["none", "aes-256-gcm"].index(self.config["cipher"])
        keys = self.open_keys(config, passphrase, key_file) if self.cipher else (bytes(32), b"")
        id_key, self.seal_key = keys
        self.id_keys = {CHUNKS: derive("highwater 1 chunk id", id_key),
                        PAGES: derive("highwater 1 page id", id_key)}
        self.vm_key = derive("highwater 1 vm key", id_key)
        self.root_key = derive("highwater 1 root", id_key)

    @lru_cache(maxsize=16)  # Packs are 32 MiB or so, and are read in many pieces.
    def load(self, path, name=None):
        data = (self.root / path).read_bytes()
        need(name in (None, blake3(data).hexdigest()), f"{path}: its hash is another")
        return data

    def names(self, folder):
        names = (file.name for file in (self.root / folder).glob("*"))
        return sorted(filter(re.compile("[A-Za-z0-9_-]+").fullmatch, names))

    def open_keys(self, config, passphrase, key_file):
        entries = [json.loads(body) for name in self.names("keys")  # Damaged ones are left out.
                   if blake3(body := self.load(f"keys/{name}")).hexdigest() == name]
        mine = {"version": 1, "repository": self.config["id"]}
        associated = b"highwater 1 key wrap" + blake3(config).digest()
        for entry in (entry for entry in entries if entry.items() >= mine.items()):
            salt, nonce, wrapped = (bytes.fromhex(entry[it]) for it in ("salt", "nonce", "wrapped"))
            if entry["kdf"] == "argon2id" and passphrase and entry["memory_kib"] <= 1 << 20:
                key = argon2.low_level.hash_secret_raw(
                    passphrase, salt, entry["passes"], entry["memory_kib"], entry["lanes"],
                    32, argon2.low_level.Type.ID, 0x13)
            elif entry["kdf"] == "blake3" and key_file:
                key = derive("highwater 1 key file", key_file + salt)
            else:
                continue
            try:
                keys = AESGCM(key).decrypt(nonce, wrapped, associated)
                return keys[:32], keys[32:]
            except InvalidTag:
                pass
        raise Damage("keys: none opens: no key given, a wrong one, or another config")

    def unseal(self, context, salt, nonce, payload, associated, what):
        if not self.cipher:
            return payload
        try:
            key = derive(context, self.seal_key + salt)
            return AESGCM(key).decrypt(nonce.to_bytes(12, "big"), payload, associated)
        except InvalidTag:
            raise Damage(f"{what}: the seal is broken") from None

    def read_index(self, name):
        data = self.load(f"index/{name}", name)
        magic, s_count, p_count, r_count = unpack_from("<8sIIQ", data)
        packs_at, blocks = 64 + 32 * s_count, -(-r_count // 84)
        firsts_at = packs_at + 48 * p_count
        blocks_at = firsts_at + 8 * blocks + 8 * -(-10 * r_count // 64)
        known = (bytes(8), blocks_at + 4096 * blocks)
        need(magic in (b"HWINDX\1\0", b"HWINDX\2\0") and (data[56:64], len(data)) == known, f"index/{name}: unknown format or length")
        tables = data[:24] + data[64:blocks_at]
        need(blake3(tables).digest() == data[24:56], f"index/{name}: damaged tables")
        packs = [unpack_from("<32sQB", data, packs_at + 48 * n) for n in range(p_count)]
        rows, last = [], (b"", 0, 0)
        for number in range(blocks):
            at, first_at = blocks_at + 4096 * number, firsts_at + 8 * number
            block = data[at:at + 4096]
            need(blake3(block[:4064]).digest() == block[4064:]
                 and block[:8] == data[first_at:first_at + 8], f"index/{name}: damaged block")
            for row in range(min(84, r_count - 84 * number)):
                id_, pack_number, *place = unpack_from("<32sIIII", block, 48 * row)
                this = (id_, pack_number, place[0])
                need(last < this and pack_number < p_count
                     and (magic[6] == 2 or last[0] < id_), f"index/{name}: bad row")
                rows.append((id_, packs[pack_number], place))
                last = this
        return {data[n:n + 32].hex() for n in range(64, packs_at, 32)}, rows

    @cached_property
    def rows(self):
        files, rows = {}, {}
        sizes = {file.name: file.stat().st_size for file in self.root.glob("packs/??/*")}
        for name in self.names("index"):
            try:
                files[name] = self.read_index(name)
            except (Damage, StructError) as damage:
                print(f"warning: left out: {damage}", file=sys.stderr)
        for name in files.keys() - set().union(*(replaced for replaced, _ in files.values())):
            for id_, (pack_id, length, kind), place in files[name][1]:
                if sizes.get(pack_id.hex()) == length:
                    rows.setdefault((kind, id_), []).append((pack_id.hex(), place))
        return rows

    def fetch(self, kind, id_):
        reason = Damage(f"{('chunk', 'page')[kind - 1]} {id_.hex()}: not in any index and pack")
        for pack_id, place in self.rows.get((kind, id_), []):
            try:
                return self.record(kind, id_, pack_id, place)
            except Damage as damage:  # Another pack may hold a good copy.
                reason = damage
        raise reason

    def record(self, kind, id_, pack_id, place):
        path, (at, length, plain_length) = f"packs/{pack_id[:2]}/{pack_id}", place
        data = self.load(path, pack_id)
        need(data[:16] == b"HWPACK\1" + bytes([kind, self.cipher] + 7 * [0]), f"{path}: bad header")
        header, payload = data[at:at + 44], data[at + 44:at + length]
        *same, codec, zero = unpack_from("<32sIIB3s", header)
        need(same == [id_, plain_length, len(payload)] and length == 44 + len(payload)
             and zero == bytes(3) and plain_length <= 4 << 20 and (kind == CHUNKS or codec == 0),
             f"{path} at {at}: not the record that the index tells of")
        payload = self.unseal("highwater 1 pack key", data[16:48], at, payload,
                              bytes([kind]) + header, f"{path} at {at}")
        plain = decompress(codec, payload, plain_length, f"{path} at {at}")
        need(blake3(plain, key=self.id_keys[kind]).digest() == id_, f"{path} at {at}: another id")
        return plain

    def read_image(self, root):
        """Yields offset and bytes of each chunk that is not all zero."""
        size, chunk, top = root["size_bytes"], root["chunk_bytes"], root["top"]
        need(chunk == self.config["chunk_bytes"], "root: another chunk size than the repository's")
        depth = next(d for d in range(12) if size <= (0 if d == 0 else chunk * 64 ** d))
        fields = pack("<QIBB", size, chunk, depth, bool(top)) + bytes.fromhex(top or "00" * 32)
        need(blake3(fields, key=self.root_key).hexdigest() == root["hash"], "root: another hash")
        if top:
            yield from self.read_page(bytes.fromhex(top), depth - 1, 0, size)

    def read_page(self, id_, level, number, size):
        page, what = self.fetch(PAGES, id_), f"page {id_.hex()}"
        bits = int.from_bytes(page[:8], "little")
        children = [64 * number + n for n in range(64) if bits >> n & 1]
        need(children and len(page) == 8 + 32 * len(children), f"{what}: bad length")
        span = self.config["chunk_bytes"] * 64 ** level
        need(children[-1] * span < size, f"{what}: a child beyond the end of the image")
        for place, child in enumerate(children):
            child_id = page[8 + 32 * place:][:32]
            if level:
                yield from self.read_page(child_id, level - 1, child, size)
                continue
            data = self.fetch(CHUNKS, child_id)
            need(len(data) == min(span, size - child * span), f"{what}: a chunk of another length")
            yield child * span, data

    def points(self, prefix=""):
        return [self.manifest(f"points/{folder}/{name}") for folder in self.names("points")
                for name in self.names(f"points/{folder}") if name.startswith(prefix)]

    def manifest(self, path):
        data = self.load(path)
        need(blake3(data[:-32]).digest() == data[-32:], f"{path}: its hash is another")
        magic, length = unpack_from("<12sI", data)
        need(magic == b"HWSEAL\1\1\1" + bytes([self.cipher, 0, 0]) and length <= 64 << 20,
             f"{path}: unknown format or cipher, or too long")
        payload = self.unseal("highwater 1 object key", data[16:48], 0, data[48:-32],
                              data[:48] + path.encode(), path)
        manifest = json.loads(decompress(1, payload, length, path))
        name, uuid = manifest["vm"]["name"], (manifest["vm"]["uuid"] or "").lower()
        text = f"uuid:{uuid}" if uuid.strip("0-") else f"name:{name}"
        folder = blake3(text.encode(), key=self.vm_key).hexdigest()[:32]
        need((path, 1) == (f"points/{folder}/{manifest['point']}", manifest["version"]),
             f"{path}: another point's manifest, or an unknown version")
        return manifest


def restore(repository, prefix, target, path):
    images = [disk["image"] for point in repository.points(prefix) for disk in point["disks"]
              if disk["target"] == target]
    need(len(images) == 1, f"{len(images)} disks {target} in points that begin with {prefix}")
    with open(path, "xb") as out:
        try:
            for at, data in repository.read_image(images[0]):
                out.seek(at)
                out.write(data)
            out.truncate(images[0]["size_bytes"])
        except BaseException:
            Path(path).unlink()
            raise


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("repo")
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument("--passphrase-file", help="its first line counts")
    secret.add_argument("--key-file", help="all its bytes count")
    parser.add_argument("command", choices=["list", "restore"])
    parser.add_argument("arguments", nargs="*", metavar="POINT DISK OUTFILE")
    args = parser.parse_args()
    try:
        line = args.passphrase_file and Path(args.passphrase_file).read_bytes().splitlines()[0]
        key_file = args.key_file and Path(args.key_file).read_bytes()
        repository = Repository(args.repo, line, key_file)
        if args.command == "restore":
            return restore(repository, *args.arguments)
        for point in repository.points():
            disks = [f"{disk['target']}={disk['image']['size_bytes']}" for disk in point["disks"]]
            print(point["point"], point["vm"]["name"], point["taken_at"], *disks)
    except (Damage, OSError, ValueError, LookupError, TypeError, StructError) as error:
        sys.exit(f"error: {error if isinstance(error, (Damage, OSError)) else repr(error)}")


if __name__ == "__main__":
    main()
