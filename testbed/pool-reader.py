#!/usr/bin/env python3
"""Reads a storage pool with nothing but its files and a recovery kit, and writes disks of points as raw files.

Written from docs/formats/storage-pool.md alone ("section" below means a section of that page), so that page and program
can be held against each other. It shares no line with the program, knows no file that is derived unless --index asks for
it, writes nothing to the pool, and takes the first copy of anything that proves right.

    pool-reader.py points  POOL --kit KIT                               list the points
    pool-reader.py restore POOL --kit KIT --point ID --to FILE [--disk N]   write one disk
    pool-reader.py restore-all POOL --kit KIT --to DIR                  write every disk as DIR/POINT-DISK.raw
    pool-reader.py verify  POOL --kit KIT [--index]                     read and hash everything
    pool-reader.py self-test                                            known answers of BLAKE3

Exit status: 0 all is right, 1 something is damaged or missing (told on stderr, a line each), 2 it could not be tried.

Python 3.9 or later with the modules cryptography and zstandard (Debian: python3-cryptography, python3-zstandard).
"""

import argparse
import array
import collections
import os
import re
import struct
import sys

# ---- BLAKE3 -------------------------------------------------------------------------------------------------------
#
# One 32-bit word of many independent compressions stands in one Python integer, 64 bits for each of them, so that one
# addition adds them all. A block of 64 KiB is 64 chunks of BLAKE3, hashed side by side: some 7 MB/s, ten times what
# hashing them one after another gives.

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
ORDER = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
CHUNK_START, CHUNK_END, PARENT, ROOT, KEYED, CONTEXT, MATERIAL = 1, 2, 4, 8, 16, 32, 64
LANES = 256


def _rounds():
    """Indexes of the message words, in the order in which the seven rounds take them."""
    order, rounds = list(range(16)), []
    for _ in range(7):
        rounds.append(tuple(order))
        order = [order[i] for i in ORDER]
    return rounds


ROUNDS = _rounds()
MIXES = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
         (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))


def _ones(lanes):
    """1 in each lane: what a word is multiplied with to stand in all of them."""
    return ((1 << (64 * lanes)) - 1) // ((1 << 64) - 1)


def _compress(value, words, counter, length, flags, ones):
    """The compression function in all lanes. `value` and `words` are lists of such integers, `counter` one."""
    mask = ones * 0xFFFFFFFF
    v = list(value) + [IV[0] * ones, IV[1] * ones, IV[2] * ones, IV[3] * ones,
                       counter & mask, (counter >> 32) & mask, length * ones, flags * ones]
    for order in ROUNDS:
        for step, (a, b, c, d) in enumerate(MIXES):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = (va + vb + words[order[2 * step]]) & mask
            vd ^= va
            vd = ((vd >> 16) | (vd << 16)) & mask
            vc = (vc + vd) & mask
            vb ^= vc
            vb = ((vb >> 12) | (vb << 20)) & mask
            va = (va + vb + words[order[2 * step + 1]]) & mask
            vd ^= va
            vd = ((vd >> 8) | (vd << 24)) & mask
            vc = (vc + vd) & mask
            vb ^= vc
            vb = ((vb >> 7) | (vb << 25)) & mask
            v[a], v[b], v[c], v[d] = va, vb, vc, vd
    return [v[i] ^ v[i + 8] for i in range(8)]


def _lanes(numbers):
    """The numbers of an array('I') or list, one in each lane."""
    wide = array.array("Q", numbers)
    if sys.byteorder == "big":
        wide.byteswap()
    return int.from_bytes(wide.tobytes(), "little")


def _unlaned(value, lanes):
    """What stands in the lanes: for each, its eight words as 32 bytes."""
    columns = []
    for word in value:
        wide = array.array("Q", word.to_bytes(8 * lanes, "little"))
        if sys.byteorder == "big":
            wide.byteswap()
        columns.append(wide)
    return [struct.pack("<8I", *row) for row in zip(*columns)]


def _words(data):
    words = array.array("I", data)
    if words.itemsize != 4:
        raise SystemExit("pool-reader: this Python has no 32-bit array type I")
    if sys.byteorder == "big":
        words.byteswap()
    return words


def _full_chunks(data, first, key, flags):
    """Chaining values of chunks of exactly 1024 bytes that are not the root; `first` is the number of the first."""
    values = []
    for start in range(0, len(data), 1024 * LANES):
        part = data[start:start + 1024 * LANES]
        lanes = len(part) // 1024
        ones = _ones(lanes)
        words = _words(part)
        counter = _lanes([first + start // 1024 + i for i in range(lanes)])
        value = [word * ones for word in key]
        for block in range(16):
            message = [_lanes(words[block * 16 + i::256]) for i in range(16)]
            more = (CHUNK_START if block == 0 else 0) | (CHUNK_END if block == 15 else 0)
            value = _compress(value, message, counter, 64, flags | more, ones)
        values += _unlaned(value, lanes)
    return values


def _last_chunk(data, number, key, flags, root):
    """Chaining value, or root value, of a chunk of at most 1024 bytes."""
    value = list(key)
    blocks = max(1, -(-len(data) // 64))
    for block in range(blocks):
        piece = data[block * 64:block * 64 + 64]
        more = CHUNK_START if block == 0 else 0
        if block == blocks - 1:
            more |= CHUNK_END | (ROOT if root else 0)
        message = struct.unpack("<16I", piece.ljust(64, b"\0"))
        value = _compress(value, message, number, len(piece), flags | more, 1)
    return struct.pack("<8I", *value)


def _blake3(data, key, flags):
    if len(data) <= 1024:
        return _last_chunk(data, 0, key, flags, True)
    full = (len(data) - 1) // 1024
    values = _full_chunks(data[:full * 1024], 0, key, flags)
    values.append(_last_chunk(data[full * 1024:], full, key, flags, False))
    while len(values) > 1:
        pairs = len(values) // 2
        root = ROOT if len(values) == 2 else 0
        words = _words(b"".join(values[:2 * pairs]))
        ones = _ones(pairs)
        message = [_lanes(words[i::16]) for i in range(16)]
        value = _compress([word * ones for word in key], message, 0, 64, flags | PARENT | root, ones)
        values = _unlaned(value, pairs) + values[2 * pairs:]
    return values[0]


def blake3(data):
    return _blake3(bytes(data), IV, 0)


def blake3_keyed(key, data):
    return _blake3(bytes(data), struct.unpack("<8I", key), KEYED)


def blake3_derive(context, material):
    key = struct.unpack("<8I", _blake3(context.encode(), IV, CONTEXT))
    return _blake3(bytes(material), key, MATERIAL)


# The known answers that BLAKE3's authors publish: bytes 0, 1, .. 250, 0, 1, .. of that length; the first 16 bytes of
# hash, keyed hash ("whats the Elvish word for friend") and derived key ("BLAKE3 2019-12-27 16:29:52 test vectors context").
KNOWN = (
    (0, "af1349b9f5f9a1a6a0404dea36dcc949", "92b2b75604ed3c761f9d6f62392c8a92", "2cc39783c223154fea8dfb7c1b1660f2"),
    (1, "2d3adedff11b61f14c886e35afa03673", "6d7878dfff2f485635d39013278ae14f", "b3e2e340a117a499c6cf2398a19ee0d2"),
    (1023, "10108970eeda3eb932baac1428c7a216", "c951ecdf03288d0fcc96ee3413563d8a", "74a16c1c3d44368a86e1ca6df64be6a2"),
    (1024, "42214739f095a406f3fc83deb889744a", "75c46f6f3d9eb4f55ecaaee480db732e", "7356cd7720d5b66b6d0697eb3177d9f8"),
    (1025, "d00278ae47eb27b34faecf67b4fe263f", "357dc55de0c7e382c900fd6e320acc04", "effaa245f065fbf82ac186839a249707"),
    (2048, "e776b6028c7cd22a4d0ba182a8bf6220", "879cf1fa2ea0e79126cb1063617a05b6", "7b2945cb4fef70885cc5d78a87bf6f62"),
    (2049, "5f4d72f40d7a5f82b15ca2b2e44b1de3", "9f29700902f7c86e514ddc4df1e3049f", "2ea477c5515cc3dd606512ee72bb3e0e"),
    (3073, "7124b49501012f81cc7f11ca069ec922", "68dede9bef00ba89e43f31a6825f4cf4", "72613c9ec9ff7e40f8f5c173784c532a"),
    (5121, "628bd2cb2004694adaab7bbd778a25df", "6ccf1c34753e7a044db80798ecd0782a", "b07f01e518e702f7ccb44a267e9e112d"),
    (7169, "a003fc7a51754a9b3c7fae0367ab3d78", "ed9b1a922c046fdb3d423ae34e143b05", "554b0a5efea9ef183f2f9b931b749799"),
)


def self_test():
    for length, hashed, keyed, derived in KNOWN:
        data = bytes(i % 251 for i in range(length))
        found = (blake3(data), blake3_keyed(b"whats the Elvish word for friend", data),
                 blake3_derive("BLAKE3 2019-12-27 16:29:52 test vectors context", data))
        for what, value, known in zip(("hash", "keyed hash", "derived key"), found, (hashed, keyed, derived)):
            if value[:16].hex() != known:
                raise Unusable(f"BLAKE3 {what} of {length} bytes is {value[:16].hex()}, expected {known}")


# ---- Words of this program ------------------------------------------------------------------------------------------


class Damage(Exception):
    """Bytes that are not what the page says."""


class Unusable(Exception):
    """Nothing can be tried: no kit, no pool, no module."""


BLOCK = 65536
PACK_END = 64 << 20
# A run has at most this much besides its pages and filters (section 7).
RUN_REST = 1 << 30


def sealed(key, nonce, data, additional, what):
    """Opens an AEAD (AES-256-GCM, the tag after the ciphertext)."""
    try:
        return AESGCM(key).decrypt(nonce, bytes(data), bytes(additional))
    except InvalidTag:
        raise Damage(f"{what}: the seal does not fit") from None


P25519 = 2 ** 255 - 19
X25519_BASE = bytes([9]) + bytes(31)


def x25519(secret, point):
    """RFC 7748."""
    scalar = int.from_bytes(secret, "little") & ~7 & ~(1 << 255) | (1 << 254)
    u = int.from_bytes(point, "little") & ((1 << 255) - 1)
    x2, z2, x3, z3, swapped = 1, 0, u, 1, 0
    for bit in range(254, -1, -1):
        set_ = scalar >> bit & 1
        if swapped ^ set_:
            x2, z2, x3, z3 = x3, z3, x2, z2
        swapped = set_
        a, b, c, d = x2 + z2, x2 - z2, x3 + z3, x3 - z3
        da, cb = d * a, c * b
        x3, z3 = (da + cb) ** 2 % P25519, u * (da - cb) ** 2 % P25519
        aa, bb = a * a % P25519, b * b % P25519
        x2, z2 = aa * bb % P25519, (aa - bb) * (aa + 121665 * (aa - bb)) % P25519
    if swapped:
        x2, z2 = x3, z3
    return (x2 * pow(z2, P25519 - 2, P25519) % P25519).to_bytes(32, "little")


def need(holds, what):
    if not holds:
        raise Damage(what)


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def fields(message, what):
    """A protobuf message: field number -> list of its values (int, or bytes)."""
    found = collections.defaultdict(list)
    at = 0

    def varint():
        nonlocal at
        number = 0
        for shift in range(0, 70, 7):
            need(at < len(message), f"{what}: a protobuf number is cut off")
            byte = message[at]
            at += 1
            number |= (byte & 127) << shift
            if byte < 128:
                return number & (1 << 64) - 1
        raise Damage(f"{what}: a protobuf number has more than 10 bytes")

    while at < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        else:
            length = {1: 8, 5: 4}.get(kind)
            if kind == 2:
                length = varint()
            need(length is not None, f"{what}: protobuf wire type {kind} is unknown")
            need(at + length <= len(message), f"{what}: a protobuf field is cut off")
            value = bytes(message[at:at + length])
            at += length
        found[key >> 3].append(value)
    return found


def integer(message, number):
    values = message.get(number, [0])
    return values[-1]


def blob(message, number):
    return message.get(number, [b""])[-1]


def text(message, number):
    return blob(message, number).decode("utf-8", "replace")


def ids(data, what):
    need(len(data) % 16 == 0, f"{what}: ids have {len(data)} bytes, not a multiple of 16")
    return [data[i:i + 16] for i in range(0, len(data), 16)]


# ---- Keys (section 3) -----------------------------------------------------------------------------------------------


def twin(path, magic, report):
    """The content of a twin file: of the first copy that is right (3.1)."""
    data = read_file(path)
    half = len(data) // 2
    contents = []
    # The second copy is where the first one ends; where the first one's length is damaged too, in the middle.
    for start in dict.fromkeys((0, half)):
        try:
            copy = data[start:]
            need(copy[:8] == magic, "no magic")
            versions(copy[8:12], path)
            length = struct.unpack_from("<I", copy, 12)[0] if len(copy) >= 16 else len(copy)
            need(16 + length + 32 <= len(copy), "cut off")
            need(blake3(copy[:16 + length]) == copy[16 + length:48 + length], "its hash does not fit")
            contents.append(copy[16:16 + length])
        except Damage as damage:
            report(f"{path}: copy at byte {start}: {damage}")
    need(contents, f"{path}: neither copy is right")
    return contents[0]


def versions(two, where):
    """The two versions that every header has: refuses what needs a newer reader."""
    read, _write = struct.unpack("<HH", two)
    need(read <= 1, f"{where}: needs format version {read}, this reader knows 1")
    need(read == 1, f"{where}: format version {read} does not exist")


def kit(path):
    """The recovery kit (3.3): pool id, recipient id, secret."""
    values = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, colon, value = line.strip().partition(":")
                if colon:
                    values.setdefault(name.strip(), value.strip())
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror}") from None
    if values.get("kit-version") != "1":
        raise Unusable(f"{path}: kit-version is {values.get('kit-version')}, expected 1")
    for secret, check in (("secret", "check"), ("secret-again", "check-again"),
                          ("secret", "check-again"), ("secret-again", "check")):
        try:
            three = [values[name] for name in ("pool-id", "recipient", secret)]
            if blake3("\n".join(three).encode())[:4].hex() == values[check]:
                return tuple(bytes.fromhex(value) for value in three)
        except (KeyError, ValueError):
            continue
    raise Unusable(f"{path}: no secret of this kit fits its check; a line is mistyped or missing")


# ---- The pool --------------------------------------------------------------------------------------------------------

Record = collections.namedtuple("Record", "number epoch time kind payload file previous generation")
Point = collections.namedtuple("Point", "id number captured datasource machine host domain consistency disks incomplete")
Disk = collections.namedtuple("Disk", "index size root levels")
Place = collections.namedtuple("Place", "pack location")


class Pool:
    """All that packs and records say."""

    def __init__(self, folder, kit_path, report):
        self.folder = folder
        self.damage = []
        # Damage that costs nothing any more: `verify` tells it, and it is no finding.
        self.mended = []
        self.report = lambda text: (self.damage.append(text), report(text))
        self.id, recipient, secret = kit(kit_path)
        if not os.path.isfile(self.path("pool.stillpoint")) and not os.path.isdir(self.path("sequence")):
            raise Unusable(f"{folder} is no storage pool: it has no pool.stillpoint")
        self.roots = self.root_keys(recipient, secret)
        self.settings = self.header()
        self.records = self.sequence()
        self.state()
        self.packs = {}
        # (domain, kind, chunk id) -> places
        self.chunks = collections.defaultdict(list)
        self.frames = collections.OrderedDict()
        self.domain_keys = {}
        self.read_packs()

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def derive(self, name, *material):
        return blake3_derive(f"stillpoint pool v1 {name}", b"".join(material))

    def root_key(self, recipient, secret):
        path = self.path("keys", f"{recipient.hex()}.key")
        try:
            content = twin(path, b"STPKEY_1", self.report)
        except FileNotFoundError:
            raise Unusable(f"{path} is missing: the kit is not of this pool, or its recipient was removed") from None
        need(len(content) == 148, f"{path}: content of {len(content)} bytes, expected 148")
        need(content[:16] == self.id, f"{path}: of pool {content[:16].hex()}, the kit is of {self.id.hex()}")
        need(content[16:32] == recipient, f"{path}: of another recipient")
        need(content[36:40] == bytes(4), f"{path}: reserved bytes are not zero")
        wrap = self.derive("wrap key", secret, self.id)
        generation = struct.unpack_from("<H", content, 34)[0]
        root = sealed(wrap, content[40:52], content[52:100], content[:40], path)
        public = x25519(self.derive("recipient key", secret, self.id), X25519_BASE)
        need(content[100:132] == public, f"{path}: another public key than follows from the secret")
        proof = self.derive("recipient proof key", root, self.id)
        need(blake3_keyed(proof, content[:132])[:16] == content[132:], f"{path}: its proof does not fit")
        return generation, root

    def root_keys(self, recipient, secret):
        """Generation -> root key: the key file, then every ring, in order of generation (section 3.4)."""
        first, root = self.root_key(recipient, secret)
        roots = {first: root}
        own = self.derive("recipient key", secret, self.id)
        names = [re.fullmatch(r"([0-9a-f]{4})(?:-again)?\.ring", name) for name in os.listdir(self.path("keys"))]
        rings = collections.defaultdict(list)
        for name in filter(None, names):
            rings[int(name[1], 16)].append(self.path("keys", name[0]))
        for generation, paths in sorted(rings.items()):
            for path in sorted(paths):
                try:
                    content = self.ring(path, generation)
                    if generation >= first:
                        self.open_ring(path, content, generation, first, recipient, own, roots)
                except (Damage, OSError) as damage:
                    self.report(str(damage))
        if 0 not in roots:
            raise Unusable("the root key of generation 0 cannot be reached: its rings are missing or damaged")
        return roots

    def ring(self, path, number):
        content = twin(path, b"STPRING1", self.report)
        need(len(content) >= 48, f"{path}: {len(content)} bytes of content")
        pool, generation, entries, older, reserved = struct.unpack_from("<16sHHH10s", content)
        need(pool == self.id and generation == number, f"{path}: ring {generation} of pool {pool.hex()}")
        need(reserved == bytes(10), f"{path}: reserved bytes are not zero")
        need(len(content) == 48 + 34 * older + 16 + 136 * entries + 18 * older, f"{path}: {len(content)} bytes of content")
        return content

    def open_ring(self, path, content, generation, first, recipient, own, roots):
        entries, count = struct.unpack_from("<HH", content, 18)
        entries_at = 48 + 34 * count + 16
        proofs_at = entries_at + 136 * entries
        if generation > first:
            # By the newest root below it that is known.
            newest = max(known for known in roots if known < generation)
            proofs = {struct.unpack_from("<H", content, at)[0]: content[at + 2:at + 18]
                      for at in range(proofs_at, len(content), 18)}
            key = self.derive("ring proof key", roots[newest], self.id)
            need(proofs.get(newest) == blake3_keyed(key, content[:proofs_at])[:16],
                 f"{path}: it is not proved by key generation {newest}")
        for at in range(entries_at, proofs_at, 136):
            entry = content[at:at + 136]
            need(entry[18:24] == bytes(6), f"{path}: reserved bytes of an entry are not zero")
            if entry[:16] == recipient and generation not in roots:
                public, once = entry[24:56], entry[56:88]
                wrap = self.derive("ring wrap key", x25519(own, once), once, public, self.id,
                                   struct.pack("<H", generation))
                roots[generation] = sealed(wrap, bytes(12), entry[88:], entry[:88], path)
        if generation in roots:
            key = self.derive("ring key", roots[generation], self.id, content[32:48])
            older = sealed(key, bytes(12), content[48:entries_at], content[:48], path)
            for at in range(0, len(older), 34):
                roots.setdefault(struct.unpack_from("<H", older, at)[0], older[at + 2:at + 34])

    def root(self, generation, where):
        need(generation in self.roots, f"{where}: sealed under key generation {generation}, which this kit does not open")
        return self.roots[generation]

    def header(self):
        """Section 4. Nothing in it is needed to restore, so damage of it is told and not more."""
        path = self.path("pool.stillpoint")
        try:
            message = fields(twin(path, b"STPPOOL1", self.report), path)
            need(blob(message, 1) == self.id, f"{path}: of another pool")
            settings = fields(blob(message, 3), path)
            return {"soft_delete": integer(settings, 1)}
        except (Damage, OSError) as damage:
            self.report(str(damage))
            return {"soft_delete": None}

    # -- Section 5

    def record(self, number, file, where):
        """A record out of the bytes of its file."""
        need(len(file) >= 144, f"{where}: {len(file)} bytes are no record")
        need(file[:8] == b"STPRECRD", f"{where}: no record's magic")
        need(blake3(file[:-32]) == file[-32:], f"{where}: its hash does not fit")
        versions(file[8:12], where)
        kind, generation, pool, found, epoch, time, previous, salt, length, zero = struct.unpack_from(
            "<HH16sQQQ32s16sII", file, 12)
        need(zero == 0, f"{where}: reserved bytes are not zero")
        need(pool == self.id, f"{where}: of pool {pool.hex()}")
        need(found == number, f"{where}: holds record {found}")
        need(len(file) == 112 + length + 32, f"{where}: {len(file)} bytes, expected {144 + length}")
        need(kind in PAYLOADS, f"{where}: kind {kind} is unknown")
        key = self.derive("record key", self.root(generation, where), self.id, salt)
        payload = sealed(key, bytes(12), file[112:-32], file[:112], where)
        return Record(number, epoch, time, kind, fields(payload, where), file, previous, generation)

    def sequence(self):
        records, unreadable, restored = {}, {}, {}
        for name in sorted(os.listdir(self.path("sequence"))):
            where = self.path("sequence", name)
            if not re.fullmatch(r"[0-9a-f]{16}\.record", name):
                self.report(f"{where}: not the name of a record")
                continue
            number = int(name[:16], 16)
            try:
                records[number] = self.record(number, read_file(where), where)
            except (Damage, OSError) as damage:
                unreadable[number] = str(damage)
        for record in list(records.values()):
            if record.kind == 13:
                number = integer(record.payload, 1)
                restored[number] = blob(record.payload, 2)
        end = max(records, default=0)
        # A record that is restored may itself restore another.
        for number in sorted(restored, reverse=True):
            if number not in records:
                try:
                    where = f"record {number} as it was restored"
                    records[number] = self.record(number, restored[number], where)
                    self.mended.append(unreadable.pop(number, f"record {number} is missing"))
                    if records[number].kind == 13:
                        restored.setdefault(integer(records[number].payload, 1), blob(records[number].payload, 2))
                except Damage as damage:
                    self.report(str(damage))
        for number in range(1, end + 1):
            if number not in records:
                self.report(unreadable.get(number, f"{self.path('sequence')}: record {number} is missing"))
        for number, why in unreadable.items():
            if number > end:
                self.report(why)
        for number, record in sorted(records.items()):
            before = records.get(number - 1)
            known = number == 1 and record.previous == bytes(32)
            if before is not None:
                # Zeros stand there too if the writer could not read the record before.
                known = record.previous in (blake3(before.file), bytes(32))
            if not known and before is not None:
                self.report(f"record {number}: the record before it is not the one its writer saw")
        # Whoever may write has the newest root; a restored record proves itself (3.4).
        kept, newest = [], 0
        for number, record in sorted(records.items()):
            if record.generation < newest and record.kind != 13:
                self.report(f"{self.path('sequence')}: record {number} is sealed under key generation "
                            f"{record.generation} after {newest} began")
                continue
            newest = max(newest, record.generation)
            kept.append(record)
        return kept

    def state(self):
        """Points, and what became of them (the kinds of section 5)."""
        self.points, self.deleted, self.suspect, self.permitted, self.packs_damaged = {}, {}, set(), set(), {}
        clock, before = 0, None
        for record in self.records:
            # Pool time (9.3).
            if before is not None:
                clock += min(max(record.time - before, 0), 3 * 86_400 * 1_000_000)
            before = record.time
            message, where = record.payload, f"record {record.number}"
            if record.kind == 4:
                disks = []
                for disk in message.get(12, []):
                    disk = fields(disk, where)
                    disks.append(Disk(integer(disk, 1), integer(disk, 2), blob(disk, 4), integer(disk, 5)))
                point = Point(blob(message, 1), record.number, integer(message, 7), blob(message, 2), text(message, 3),
                              text(message, 4), blob(message, 5), text(message, 8), disks, bool(integer(message, 16)))
                self.points[point.id] = point
            elif record.kind == 5:
                self.deleted.setdefault(blob(message, 1), clock)
            elif record.kind == 6:
                self.deleted.pop(blob(message, 1), None)
            elif record.kind == 8:
                self.permitted.update(ids(blob(message, 1), where))
            elif record.kind == 11:
                self.suspect.update(ids(blob(message, 1), where))
        self.clock = clock

    def status(self, point):
        if point.id not in self.deleted:
            return "suspect" if point.id in self.suspect else "good"
        soft = self.settings["soft_delete"]
        if soft is not None and self.clock >= self.deleted[point.id] + soft * 1_000_000:
            return "expired"
        return "deleted"

    # -- Section 6

    def read_packs(self):
        top = self.path("packs")
        for prefix in sorted(os.listdir(top)) if os.path.isdir(top) else []:
            for name in sorted(os.listdir(os.path.join(top, prefix))):
                path = os.path.join(top, prefix, name)
                if not re.fullmatch(r"[0-9a-f]{32}\.pack", name) or name[:2] != prefix:
                    self.report(f"{path}: not the name of a pack")
                    continue
                try:
                    pack = opened(self, path, bytes.fromhex(name[:32]))
                except (Damage, OSError) as damage:
                    self.report(str(damage))
                    continue
                self.packs[pack.id] = pack
                try:
                    pack.table = pack.mending(pack.read_table)
                except Damage as damage:
                    self.report(str(damage))
                    pack.table = pack.salvage()
                for chunk, location in pack.table:
                    self.chunks[pack.domain, pack.kind, chunk].append(Place(pack, location))

    def id_key(self, domain):
        """Of generation 0 for ever."""
        if domain not in self.domain_keys:
            self.domain_keys[domain] = self.derive("id key", self.roots[0], self.id, domain)
        return self.domain_keys[domain]

    def chunk_id(self, domain, kind, content):
        return blake3_keyed(self.id_key(domain), bytes([kind]) + blake3(content))[:16]

    def chunk(self, domain, kind, chunk):
        """The content of a chunk, from the first place where it is right."""
        wrong = []
        for place in self.chunks.get((domain, kind, chunk), []):
            key = (place.pack.id, place.location // 16)
            try:
                if key not in self.frames:
                    self.frames[key] = place.pack.frame(place.location // 16 * 64)
                    if len(self.frames) > 64:
                        self.frames.popitem(last=False)
                contents = self.frames[key]
                need(place.location % 16 < len(contents), f"{place.pack.path}: no chunk at location {place.location}")
                content = contents[place.location % 16]
                need(self.chunk_id(domain, kind, content) == chunk,
                     f"{place.pack.path}: location {place.location} holds another chunk")
                return content
            except (Damage, OSError) as damage:
                wrong.append(str(damage))
        raise Damage(f"chunk {chunk.hex()}: " + ("; ".join(wrong) or "in no pack"))

    # -- Section 8

    def blocks(self, point, disk):
        """(number of the block, its chunk id) of every block that is not zeros, in order."""
        count = -(-disk.size // BLOCK)
        levels = 1
        while 128 ** levels < count:
            levels += 1
        if not disk.root:
            return
        need(disk.levels == levels, f"a map of {disk.levels} levels, expected {levels} for {count} blocks")

        def node(chunk, level, first):
            data = self.chunk(point.domain, 2, chunk)
            need(len(data) >= 20, f"map node {chunk.hex()}: {len(data)} bytes")
            need(data[0] == 1 and data[1] == level and data[2:4] == bytes(2),
                 f"map node {chunk.hex()}: header {data[:4].hex()}, expected version 1, level {level}")
            present = [i for i in range(128) if data[4 + i // 8] >> (i % 8) & 1]
            need(len(data) == 20 + 16 * len(present), f"map node {chunk.hex()}: {len(data)} bytes")
            step = 128 ** level
            for place, child in zip(present, ids(data[20:], "map node")):
                at = first + place * step
                need(at < count, f"map node {chunk.hex()}: block {at} is behind the disk's end")
                if level == 0:
                    yield at, child
                else:
                    yield from node(child, level - 1, at)

        yield from node(disk.root, levels - 1, 0)

    def restore(self, point, disk, path):
        """Writes the disk as a sparse raw file that did not exist before."""
        with open(path, "xb") as out:
            out.truncate(disk.size)
            for block, chunk in self.blocks(point, disk):
                data = self.chunk(point.domain, 1, chunk)
                rest = disk.size - block * BLOCK
                need(not any(data[rest:]), f"block {block} has bytes behind the disk's end")
                out.seek(block * BLOCK)
                out.write(data[:rest])


class Pack:
    """One pack file (section 6)."""

    def __init__(self, pool, path, pack, mended=None):
        self.pool, self.path, self.id = pool, path, pack
        self.length = os.path.getsize(path)
        self.parity, self.mended = Parity.of(path), mended
        # Where the trailer ends; parity is behind it (6.1).
        self.end = self.parity.content if self.parity else self.length
        need(self.end >= 64, f"{path}: {self.length} bytes are no pack")
        self.header = self.read(0, 64)
        magic, two, self.kind, generation, owner, self.domain, named = struct.unpack("<8s4sHH16s16s16s", self.header)
        need(magic == b"STPPACK1", f"{path}: no pack's magic")
        versions(two, path)
        need(self.kind in (1, 2), f"{path}: kind {self.kind}")
        need(owner == pool.id, f"{path}: of pool {owner.hex()}")
        need(named == pack, f"{path}: holds pack {named.hex()}")
        data = pool.derive("data key", pool.root(generation, path), pool.id, self.domain)
        self.key = pool.derive("pack key", data, pool.id, pack)

    def read(self, offset, length):
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
        need(len(data) == length, f"{self.path}: ends before byte {offset + length}")
        return patched(offset, data, self.mended or {})

    def mending(self, work, *words):
        """What `work` gives; if that is damaged and there is parity, once more with the sectors that it gives."""
        try:
            return work(*words)
        except Damage:
            if self.parity is None or self.mended is not None:
                raise
            self.mended = self.parity.mended(self.pool.report)
            return work(*words)

    def read_table(self):
        """[(chunk id, location)] in order of location."""
        need(self.end >= 128, f"{self.path}: {self.end} bytes are no pack")
        trailer = self.read(self.end - 64, 64)
        magic, offset, stored, chunks, frames, reserved, found = struct.unpack("<8sQIIII32s", trailer)
        need(magic == b"STPPEND1" and reserved == 0, f"{self.path}: no trailer")
        need(offset % 64 == 0 and 64 <= offset and offset + stored + 64 == self.end,
             f"{self.path}: a table of {stored} bytes at {offset}")
        table = self.read(offset, stored)
        need(blake3(self.header + table + trailer[:32]) == found, f"{self.path}: the hash of the table does not fit")
        table = sealed(self.key, struct.pack("<Q", offset) + b"TBL1", table, self.header, self.path)
        need(len(table) == 20 * chunks, f"{self.path}: a table of {len(table)} bytes for {chunks} chunks")
        entries = [(table[i:i + 16], struct.unpack_from("<I", table, i + 16)[0]) for i in range(0, len(table), 20)]
        locations = [location for _, location in entries]
        need(locations == sorted(set(locations)), f"{self.path}: locations do not ascend")
        need(all(location < 1 << 24 for location in locations), f"{self.path}: a location of more than 24 bits")
        need(len({location // 16 for location in locations}) == frames, f"{self.path}: not {frames} frames")
        self.table_offset = offset
        return entries

    def frame(self, offset):
        """The chunks of the frame at `offset`."""
        return self.mending(self.frame_as_it_lies, offset)

    def frame_as_it_lies(self, offset):
        where = f"{self.path}: frame at byte {offset}"
        need(64 <= offset < PACK_END and offset % 64 == 0, f"{where}: no place for a frame")
        head = self.read(offset, 32)
        magic, stored, codec, count, reserved, length, short = struct.unpack("<4sIBBHI16s", head)
        need(magic == b"FRM1" and reserved == 0, f"{where}: no frame")
        need(1 <= count <= 16 and stored >= 16 and length <= 16 * (BLOCK + 4), f"{where}: {count} chunks, {length} bytes")
        data = self.read(offset + 32, stored)
        need(blake3(data)[:16] == short, f"{where}: its hash does not fit")
        plain = sealed(self.key, struct.pack("<QI", offset, 0), data, head[:16], where)
        if codec == 1:
            plain = decoded(plain, length, where)
        else:
            need(codec == 0, f"{where}: codec {codec} is unknown")
        need(len(plain) == length, f"{where}: {len(plain)} bytes decoded, expected {length}")
        if self.kind == 1:
            need(length == count * BLOCK, f"{where}: {length} bytes for {count} blocks")
            return [plain[i * BLOCK:(i + 1) * BLOCK] for i in range(count)]
        lengths = struct.unpack_from(f"<{count}I", plain) if length >= 4 * count else ()
        need(lengths and 4 * count + sum(lengths) == length, f"{where}: the lengths of its nodes do not fit")
        nodes, at = [], 4 * count
        for size in lengths:
            nodes.append(plain[at:at + size])
            at += size
        return nodes

    def salvage(self):
        """The table that frames themselves tell, where the pack's own is damaged: a frame stands for itself."""
        entries, offset = [], 64
        while offset + 32 <= min(self.end, PACK_END):
            try:
                stored = struct.unpack_from("<I", self.read(offset, 8), 4)[0]
                contents = self.frame(offset)
            except Damage:
                # Frames lie at multiples of 64; the next one is looked for.
                offset += 64
                continue
            for i, content in enumerate(contents):
                entries.append((self.pool.chunk_id(self.domain, self.kind, content), offset // 64 * 16 + i))
            offset = -(-(offset + 32 + stored) // 64) * 64
        return entries


def opened(pool, path, pack):
    """A pack; where its header is damaged and it has parity, with the sectors that this gives."""
    try:
        return Pack(pool, path, pack)
    except Damage:
        parity = Parity.of(path)
        if parity is None:
            raise
        return Pack(pool, path, pack, parity.mended(pool.report))


SECTOR = 4096


def patched(offset, data, sectors):
    """`data` of a file from `offset` on, with whole sectors of the file put in the place of theirs."""
    data = bytearray(data)
    for index in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)) if sectors else ():
        if index in sectors:
            start = max(offset, index * SECTOR)
            end = min(offset + len(data), (index + 1) * SECTOR)
            data[start - offset:end - offset] = sectors[index][start - index * SECTOR:end - index * SECTOR]
    return bytes(data)


class Parity:
    """What stands behind the trailer of a pack in a pool with parity (section 6.1)."""

    def __init__(self, path, content, sectors, groups, short):
        self.path, self.content, self.sectors, self.groups, self.short = path, content, sectors, groups, short
        size = 8 * (sectors + groups)
        self.first = -(-content // SECTOR) * SECTOR
        self.parity = -(-(self.first + 64 + size) // SECTOR) * SECTOR
        self.second = self.parity + SECTOR * groups
        self.end = self.second + size + 64
        self.places = (self.second, self.first + 64)

    @classmethod
    def of(cls, path):
        """The parity of a pack file, or None: the last footer that is right, or the first one."""
        length = os.path.getsize(path)
        with open(path, "rb") as file:
            at, last = length - 64, True
            while at >= 128:
                file.seek(at)
                footer = file.read(64)
                if last and footer[:8] == b"STPPEND1":
                    return None
                if footer[:8] == b"STPPARI1" and blake3(footer[:48])[:16] == footer[48:]:
                    content, sectors, groups, reserved, short = struct.unpack_from("<QIIQ16s", footer, 8)
                    if reserved == 0 and sectors == -(-content // SECTOR) and 1 <= groups <= sectors:
                        found = cls(path, content, sectors, groups, short)
                        if (found.end == length) if last else (found.first == at):
                            return found
                at, last = (length // SECTOR * SECTOR if last else at - SECTOR), False
        return None

    def read(self, offset, length):
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(length)

    def hashes(self):
        size = 8 * (self.sectors + self.groups)
        for at in self.places:
            data = self.read(at, size)
            if blake3(data)[:16] == self.short:
                return [data[i:i + 8] for i in range(0, size, 8)]
        return None

    def sector(self, index):
        """A sector of content, or behind these one of parity."""
        if index < self.sectors:
            at = index * SECTOR
            return self.read(at, min(SECTOR, self.content - at)).ljust(SECTOR, b"\0")
        return self.read(self.parity + (index - self.sectors) * SECTOR, SECTOR)

    def mended(self, report):
        """The sectors of content that are damaged and can be rebuilt, by their index."""
        hashes = self.hashes()
        if hashes is None:
            report(f"{self.path}: the hashes of its parity are damaged")
            return {}
        bad = {i for i in range(self.sectors + self.groups) if blake3(self.sector(i))[:8] != hashes[i]}
        found = {}
        for index in sorted(bad):
            if index >= self.sectors:
                report(f"{self.path}: sector {index - self.sectors} of its parity is damaged")
                continue
            group = index % self.groups
            others = [i for i in range(group, self.sectors, self.groups) if i != index] + [self.sectors + group]
            value = 0
            for other in others:
                value ^= int.from_bytes(self.sector(other), "little")
            data = value.to_bytes(SECTOR, "little")
            if bad.isdisjoint(others) and blake3(data)[:8] == hashes[index]:
                found[index] = data
                report(f"{self.path}: sector {index} is damaged, and was rebuilt from parity")
            else:
                report(f"{self.path}: sector {index} is damaged, and cannot be rebuilt: another of its group is too")
        return found

    def check(self, report):
        """Holds the parity itself against the page; what it is the parity of is read as frames and table."""
        size = 8 * (self.sectors + self.groups)
        if os.path.getsize(self.path) != self.end:
            report(f"{self.path}: does not end where its parity says")
        if self.read(self.first, 64) != self.read(self.end - 64, 64):
            report(f"{self.path}: a footer of its parity is damaged")
        for at in self.places:
            if blake3(self.read(at, size))[:16] != self.short:
                report(f"{self.path}: the hashes of its parity at byte {at} are damaged")
        behind = self.first + 64 + size
        if any(self.read(self.content, self.first - self.content) + self.read(behind, self.parity - behind)):
            report(f"{self.path}: padding of its parity is not zeros")
        hashes = self.hashes() or []
        for group, known in enumerate(hashes[self.sectors:]):
            if blake3(self.sector(self.sectors + group))[:8] != known:
                report(f"{self.path}: sector {group} of its parity is damaged")


def decoded(data, length, where):
    out = bytearray()
    while data:
        try:
            decoder = zstandard.ZstdDecompressor().decompressobj()
            out += decoder.decompress(data)
        except zstandard.ZstdError as error:
            raise Damage(f"{where}: zstd: {error}") from None
        need(len(out) <= length and len(decoder.unused_data) < len(data), f"{where}: decodes to more than {length} bytes")
        data = decoder.unused_data
    return bytes(out)


# ---- What is derived (sections 5.1 and 7): read only to hold it against packs and records ---------------------------


class Run:
    """One run file."""

    def __init__(self, pool, path, number):
        self.path, self.number = path, number
        data = read_file(path)
        need(len(data) >= 160, f"{path}: {len(data)} bytes are no run")
        header, trailer = data[:64], data[-96:]
        magic, two, generation, reserved, owner, found, rest = struct.unpack("<8s4sH2s16sQ24s", header)
        key = pool.derive("run key", pool.root(generation, path), pool.id, struct.pack("<Q", number))
        need(magic == b"STPRUN_1" and reserved == bytes(2) and rest == bytes(24), f"{path}: no run's header")
        versions(two, path)
        need(owner == pool.id and found == number, f"{path}: of pool {owner.hex()}, number {found}")
        magic, entries, packs, superseded, pages, self.record, rest, tail_hash, own = struct.unpack(
            "<8sQIIIQ12s32s16s", trailer)
        need(magic == b"STPRUNE1" and rest == bytes(12), f"{path}: no run's trailer")
        need(blake3_keyed(key, header + trailer[:80])[:16] == own, f"{path}: the hash of the trailer does not fit")
        need(pages == -(-entries // 185), f"{path}: {pages} pages for {entries} entries")
        tail = data[len(data) - 96 - 48 * packs - 8 * superseded - 8 * pages:-96]
        need(blake3_keyed(key, header + tail) == tail_hash, f"{path}: the hash of the tail does not fit")
        self.packs = [struct.unpack_from("<16s16sH6sQ", tail, 48 * i) for i in range(packs)]
        self.superseded = [number for (number,) in struct.iter_unpack("<Q", tail[48 * packs:48 * packs + 8 * superseded])]
        firsts = tail[48 * packs + 8 * superseded:]
        self.entries, at = [], 64
        for partition in range(0, pages, 21_600):
            inside = []
            for number in range(partition, min(partition + 21_600, pages)):
                page = data[at:at + 4096]
                at += 4096
                need(struct.unpack_from("<QH", page, 4070) == (number, 0), f"{path}: page {number} is another one")
                need(blake3_keyed(key, page[:4080])[:16] == page[4080:], f"{path}: page {number}: its hash does not fit")
                count = min(185, entries - 185 * number)
                need(not any(page[22 * count:4070]), f"{path}: page {number}: bytes behind its last entry")
                for i in range(count):
                    entry = page[22 * i:22 * i + 22]
                    inside.append((entry[:16], int.from_bytes(entry[16:19], "little"),
                                   int.from_bytes(entry[19:22], "little")))
                first = struct.unpack_from("<Q", firsts, 8 * number)[0]
                need(int.from_bytes(page[:8], "big") == first, f"{path}: page {number}: another first id")
            blocks = -(-12 * len(inside) // 256)
            words = [0] * (8 * blocks)
            for chunk, _, _ in inside:
                f = int.from_bytes(chunk[8:], "big")
                block = ((f >> 40) * blocks) >> 24
                for i in range(8):
                    words[8 * block + i] |= 1 << ((f >> 5 * i) & 31)
            found = data[at:at + 32 * blocks]
            check = data[at + 32 * blocks:at + 32 * blocks + 16]
            at += 32 * blocks + 16
            number = partition // 21_600
            need(found == struct.pack(f"<{8 * blocks}I", *words), f"{path}: filter {number} is not that of its entries")
            need(blake3_keyed(key, found + b"filter" + struct.pack("<Q", number))[:16] == check,
                 f"{path}: filter {number}: its hash does not fit")
            self.entries += inside
        need(at + len(tail) + 96 == len(data), f"{path}: {len(data)} bytes, expected {at + len(tail) + 96}")
        need(self.entries == sorted(self.entries), f"{path}: entries do not ascend")
        need(all(position < packs for _, position, _ in self.entries), f"{path}: an entry of a pack that is not listed")


class Counts:
    """One file of reference counts (section 7.1)."""

    def __init__(self, pool, path, number):
        self.path, self.number = path, number
        data = read_file(path)
        need(len(data) >= 160, f"{path}: {len(data)} bytes are no file of counts")
        header, trailer = data[:64], data[-96:]
        magic, two, generation, reserved, owner, found, rest = struct.unpack("<8s4sH2s16sQ24s", header)
        key = pool.derive("counts key", pool.root(generation, path), pool.id, struct.pack("<Q", number))
        need(magic == b"STPCNT_1" and reserved == bytes(2) and rest == bytes(24), f"{path}: no header of counts")
        versions(two, path)
        need(owner == pool.id and found == number, f"{path}: of pool {owner.hex()}, number {found}")
        magic, entries, packs, below, pages, _, more, rest, tail_hash, own = struct.unpack(
            "<8sQIIIQQ4s32s16s", trailer)
        need(magic == b"STPCNTE1" and packs == 0 and rest == bytes(4), f"{path}: no trailer of counts")
        need(blake3_keyed(key, header + trailer[:80])[:16] == own, f"{path}: the hash of the trailer does not fit")
        need(pages == -(-entries // 185), f"{path}: {pages} pages for {entries} entries")
        need(len(data) == 64 + 4096 * pages + 8 * below + 8 * pages + more + 96, f"{path}: {len(data)} bytes")
        tail = data[64 + 4096 * pages:-96]
        need(blake3_keyed(key, header + tail) == tail_hash, f"{path}: the hash of the tail does not fit")
        self.below = [number for (number,) in struct.iter_unpack("<Q", tail[:8 * below])]
        self.changes = []
        for number in range(pages):
            page = data[64 + 4096 * number:64 + 4096 * (number + 1)]
            need(struct.unpack_from("<QH", page, 4070) == (number, 0), f"{path}: page {number} is another one")
            need(blake3_keyed(key, page[:4080])[:16] == page[4080:], f"{path}: page {number}: its hash does not fit")
            count = min(185, entries - 185 * number)
            need(not any(page[22 * count:4070]), f"{path}: page {number}: bytes behind its last entry")
            for i in range(count):
                entry = page[22 * i:22 * i + 22]
                self.changes.append((entry[:16], int.from_bytes(entry[16:], "little", signed=True)))
            first = struct.unpack_from("<Q", tail, 8 * below + 8 * number)[0]
            need(int.from_bytes(page[:8], "big") == first, f"{path}: page {number}: another first id")
        found = [chunk for chunk, _ in self.changes]
        need(found == sorted(set(found)), f"{path}: ids do not ascend")
        more = tail[8 * below + 8 * pages:]
        need(len(more) >= 48, f"{path}: {len(more)} bytes of roots and packs")
        roots, rows = struct.unpack_from("<II", more, 40)
        need(len(more) == 48 + 24 * roots + 40 * rows, f"{path}: {len(more)} bytes of {roots} roots and {rows} packs")
        self.roots = [struct.unpack_from("<16sB3sI", more, 48 + 24 * i) for i in range(roots)]
        self.packs = [struct.unpack_from("<16sQIIII", more, 48 + 24 * roots + 40 * i) for i in range(rows)]


def check_counts(pool, files):
    """The newest counts against the maps of the roots that they name, as far as these are still there."""
    if not files:
        return
    newest = files[max(files)]
    found = collections.Counter()
    for number in newest.below + [newest.number]:
        if number not in files:
            pool.report(f"{newest.path}: stands on file {number}, which is not there")
            return
        for chunk, change in files[number].changes:
            found[chunk] += change
    domains = {chunk: domain for domain, kind, chunk in pool.chunks if kind == 2}
    expected = collections.Counter()
    seen, todo = set(), []
    for root, level, _, times in newest.roots:
        expected[root] += times
        todo.append((root, level))
    while todo:
        chunk, level = todo.pop()
        if chunk in seen:
            continue
        seen.add(chunk)
        if chunk not in domains:
            # A point went since, and its nodes with it.
            return
        data = pool.chunk(domains[chunk], 2, chunk)
        for child in set(ids(data[20:], "map node")):
            expected[child] += 1
            if level > 0:
                todo.append((child, level - 1))
    for chunk in sorted(set(found) | set(expected)):
        if found[chunk] != expected[chunk]:
            pool.report(f"{newest.path}: chunk {chunk.hex()} has a count of {found[chunk]}, expected {expected[chunk]}")


def check_runs(pool):
    runs, counts = {}, {}
    for name in sorted(os.listdir(pool.path("index"))) if os.path.isdir(pool.path("index")) else []:
        path = pool.path("index", name)
        if re.fullmatch(r"[0-9a-f]{16}\.run", name):
            try:
                runs[int(name[:16], 16)] = Run(pool, path, int(name[:16], 16))
            except (Damage, OSError) as damage:
                pool.report(str(damage))
        elif re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{16}\.records", name):
            try:
                check_bundle(pool, path, int(name[:16], 16), int(name[17:33], 16))
            except (Damage, OSError) as damage:
                pool.report(str(damage))
        elif re.fullmatch(r"[0-9a-f]{16}\.counts", name):
            try:
                counts[int(name[:16], 16)] = Counts(pool, path, int(name[:16], 16))
            except (Damage, OSError) as damage:
                pool.report(str(damage))
        else:
            pool.report(f"{path}: neither a run, nor counts, nor a bundle")
    try:
        check_counts(pool, counts)
    except (Damage, OSError) as damage:
        pool.report(str(damage))
    gone = {number for run in runs.values() for number in run.superseded}
    for run in runs.values():
        if run.number in gone:
            continue
        tables = {}
        for pack, domain, kind, _, length in run.packs:
            known = pool.packs.get(pack)
            if known is None:
                if pack not in pool.permitted:
                    pool.report(f"{run.path}: names pack {pack.hex()}, which is not there")
                continue
            if (known.domain, known.kind, known.length) != (domain, kind, length):
                pool.report(f"{run.path}: says of pack {pack.hex()}: domain {domain.hex()}, kind {kind}, {length} bytes")
            tables[pack] = set(known.table)
        for chunk, position, location in run.entries:
            table = tables.get(run.packs[position][0])
            if table is None:
                continue
            if (chunk, location) not in table:
                pool.report(f"{run.path}: chunk {chunk.hex()} is not at {location} of {run.packs[position][0].hex()}")
            table.discard((chunk, location))
        for pack, table in tables.items():
            for chunk, location in table:
                pool.report(f"{run.path}: knows pack {pack.hex()} and not its chunk {chunk.hex()} at {location}")
    return len(runs)


def check_bundle(pool, path, first, last):
    data = read_file(path)
    need(len(data) >= 120, f"{path}: {len(data)} bytes are no bundle")
    magic, two, generation, reserved, owner, low, high, salt, length = struct.unpack_from("<8s4sH2s16sQQ16sQ", data)
    need(magic == b"STPBUNDL" and reserved == bytes(2), f"{path}: no bundle's header")
    versions(two, path)
    need((owner, low, high) == (pool.id, first, last), f"{path}: of pool {owner.hex()}, records {low} to {high}")
    need(len(data) == 72 + length + 32, f"{path}: {len(data)} bytes, expected {104 + length}")
    need(blake3(data[:-32]) == data[-32:], f"{path}: its hash does not fit")
    key = pool.derive("bundle key", pool.root(generation, path), pool.id, salt)
    content = sealed(key, bytes(12), data[72:-32], data[:72], path)
    records = {record.number: record for record in pool.records}
    at = 0
    for number in range(first, last + 1):
        need(at + 22 <= len(content), f"{path}: ends before record {number}")
        epoch, time, kind, length = struct.unpack_from("<QQHI", content, at)
        payload = content[at + 22:at + 22 + length]
        at += 22 + length
        record = records.get(number)
        if record is not None:
            need((epoch, time, kind, fields(payload, path)) == (record.epoch, record.time, record.kind, record.payload),
                 f"{path}: says another thing of record {number} than its file")
    need(len(content) == at + 32, f"{path}: {len(content)} bytes of content, expected {at + 32}")
    if last in records:
        need(content[at:] == blake3(records[last].file), f"{path}: ends with another record {last}")


# ---- Commands ----------------------------------------------------------------------------------------------------------

# Section 5's kinds: those that this reader knows to be records of version 1.
PAYLOADS = frozenset(range(1, 18))


def points(pool, _options):
    for point in pool.points.values():
        sizes = " ".join(f"{disk.index}:{disk.size}" for disk in point.disks)
        print(point.id.hex(), pool.status(point), point.captured, point.consistency, point.machine, sizes)


def restore(pool, options):
    chosen = [p for p in pool.points.values() if p.id.hex().startswith(options.point)]
    if len(chosen) != 1:
        raise Unusable(f"{len(chosen)} points have an id that begins with {options.point}; `points` lists them")
    disks = [disk for disk in chosen[0].disks if disk.index == options.disk]
    if len(disks) != 1:
        raise Unusable(f"the point has no disk {options.disk}")
    pool.restore(chosen[0], disks[0], options.to)


def restore_all(pool, options):
    os.makedirs(options.to, exist_ok=True)
    for point in pool.points.values():
        status = pool.status(point)
        for disk in point.disks:
            path = os.path.join(options.to, f"{point.id.hex()}-{disk.index}.raw")
            try:
                pool.restore(point, disk, path)
                print(point.id.hex(), disk.index, status)
            except Damage as damage:
                os.unlink(path)
                # What an expired point needs may be reclaimed (9.2).
                if status == "expired":
                    print(point.id.hex(), disk.index, "expired and reclaimed")
                else:
                    pool.report(f"point {point.id.hex()}, disk {disk.index}: {damage}")


def verify(pool, options):
    for what in pool.mended:
        print(f"mended by a later record: {what}")
    chunks = 0
    for pack in pool.packs.values():
        if pack.parity:
            pack.parity.check(pool.report)
        wanted = dict((location, chunk) for chunk, location in pack.table)
        for offset in sorted({location // 16 * 64 for location in wanted}):
            try:
                contents = pack.frame(offset)
                for i, content in enumerate(contents):
                    chunk = wanted.pop(offset // 64 * 16 + i, None)
                    need(chunk == pool.chunk_id(pack.domain, pack.kind, content),
                         f"{pack.path}: frame at byte {offset}: chunk {i} is another one")
                    chunks += 1
            except Damage as damage:
                pool.report(str(damage))
    whole = 0
    for point in pool.points.values():
        if pool.status(point) == "expired":
            continue
        try:
            for disk in point.disks:
                for block, chunk in pool.blocks(point, disk):
                    need((point.domain, 1, chunk) in pool.chunks, f"block {block} of disk {disk.index} is in no pack")
            whole += 1
        except Damage as damage:
            pool.report(f"point {point.id.hex()}: {damage}")
    runs = check_runs(pool) if options.index else 0
    print(f"{len(pool.records)} records, {len(pool.packs)} packs, {chunks} chunks, {whole} points, {runs} runs; "
          f"{len(pool.damage)} findings")


def main():
    parser = argparse.ArgumentParser(description="Read a storage pool with its files and a recovery kit alone.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, work in (("points", points), ("restore", restore), ("restore-all", restore_all), ("verify", verify)):
        command = commands.add_parser(name)
        command.set_defaults(work=work)
        command.add_argument("pool", help="the folder that holds pool.stillpoint")
        command.add_argument("--kit", required=True, help="the recovery kit, a text file")
        if name == "restore":
            command.add_argument("--point", required=True, help="its id, or what the id begins with")
            command.add_argument("--disk", type=int, default=0)
        if name.startswith("restore"):
            command.add_argument("--to", required=True, help="file (restore-all: folder) to write")
        if name == "verify":
            command.add_argument("--index", action="store_true", help="hold runs and bundles against packs and records")
    commands.add_parser("self-test").set_defaults(work=None)
    options = parser.parse_args()
    self_test()
    if options.work is None:
        print("BLAKE3 gives the known answers.")
        return 0
    if IMPORT_ERROR:
        raise Unusable(f"{IMPORT_ERROR}; on Debian: apt-get install python3-cryptography python3-zstandard")
    pool = Pool(options.pool, options.kit, lambda what: print(f"pool-reader: {what}", file=sys.stderr))
    options.work(pool, options)
    return 1 if pool.damage else 0


IMPORT_ERROR = None
try:
    import zstandard
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError as error:
    IMPORT_ERROR = str(error)

if __name__ == "__main__":
    try:
        sys.exit(main())
    except Damage as damage:
        print(f"pool-reader: {damage}", file=sys.stderr)
        sys.exit(1)
    except (Unusable, OSError) as error:
        print(f"pool-reader: {error}", file=sys.stderr)
        sys.exit(2)
