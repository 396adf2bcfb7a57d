#!/usr/bin/env python3
"""bench.py - Stillpoint beside its peers and the machine's limit, on the same disks, in one run.

`cargo xtask bench` builds what is needed and calls this. Rows are ratios of CPU seconds (user + system of the whole process
tree), wall seconds and bytes, each pair run in turn in this run; with several seeds the median, and the least and the
greatest. The bars are those of the project's issue about the storage pool; docs/benchmarks.md says how to read them.

    bench.py --program STILLPOINT --floor BENCH [--examples DIR] [--work DIR] [--seeds 1,2,3] [--size-mib 2048]
             [--rows full,tls,..] [--out FILE]

Needs Linux, root for the generator's loop mounts, and restic 0.18 or newer (`--restic PATH`, the PATH, or fetched from
Debian's next release into the work folder). rustic is measured when it is found. Standard library only.
"""
import argparse, json, os, re, shutil, signal, socket, statistics, subprocess, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))
GENERATOR = os.path.join(HERE, "..", "testbed", "make-workload.py")
ALL_ROWS = "full,tls,day2,size,growth,scan,recover,aged,reads,verify,list,prune,sparse,index,reclaim".split(",")


class Failed(Exception):
    pass


class Run:
    """One finished command."""

    def __init__(self, wall, cpu, rss, out):
        self.wall, self.cpu, self.rss, self.out = wall, cpu, rss, out


def run(*words, env=None, cwd=None, ok=(0,)):
    """Runs a command to its end; CPU and memory of it and of everything that it waited for."""
    log = open(os.path.join(A.work, "last.log"), "w+b")
    began = time.monotonic()
    child = subprocess.Popen([str(w) for w in words], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                             env=dict(ENV, **(env or {})), cwd=cwd)
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    log.seek(0)
    text = log.read().decode(errors="replace")
    log.close()
    if child.returncode not in ok:
        raise Failed("%s: status %d\n%s" % (" ".join(map(str, words)), child.returncode, text[-2000:]))
    return Run(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, text)


def size(path):
    """Bytes of all files below a folder."""
    return sum(os.lstat(os.path.join(f, n)).st_size for f, _, names in os.walk(path) for n in names)


def warm(path):
    with open(path, "rb") as f:
        while f.read(1 << 22):
            pass


def drop(folder):
    """Drops the files of a folder from the page cache; what is dirty is written first."""
    os.sync()
    for f, _, names in os.walk(folder):
        for n in names:
            h = os.open(os.path.join(f, n), os.O_RDONLY)
            os.posix_fadvise(h, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(h)


def remove(*paths):
    for p in paths:
        if os.path.isdir(p):
            shutil.rmtree(p)
        elif os.path.lexists(p):
            os.unlink(p)


def generator(*words):
    return run(sys.executable, GENERATOR, *words)


def workload(seed, size_mib, vms, days, name=None):
    out = os.path.join(A.work, name or "disks-%d-%d" % (size_mib, seed))
    if not os.path.exists(os.path.join(out, "manifest.json")):
        remove(out)
        say("making disks: seed %d, %d MiB, %s, %d days" % (seed, size_mib, vms, days))
        generator("make", out, "--size-mib", size_mib, "--days", days, "--vms", vms, "--seed", seed)
    return out


def changes(disks, vm, day, path):
    """The change list of a day as our program takes it."""
    with open("%s/%s/day%d.json" % (disks, vm, day)) as f:
        dirty = json.load(f)["dirty"]
    pairs = [[e["start"], e["length"]] if isinstance(e, dict) else e for e in dirty]
    with open(path, "w") as f:
        json.dump(pairs, f)


def say(text):
    print("bench: " + text, file=sys.stderr, flush=True)


class Ours:
    """Our program, standalone, on a data folder."""

    def __init__(self, name, disk):
        self.data, self.kit, self.disk = path(name), path(name + "-kit.txt"), disk
        self.list = path(name + "-list.json")
        remove(self.data, self.kit)

    def cmd(self, *words, **more):
        return run(A.program, "--standalone", self.data, *words, **more)

    def create(self):
        return self.cmd("datasource", "add-image", "vm", self.disk, "--recovery-kit", self.kit, "--floor-points", 0,
                        "--floor-age", 0, "--soft-delete", 0, "--reclaim-hold", 0)

    def protect(self):
        """First full backup, the making of the repository included."""
        a, b = self.create(), self.cmd("protect", "vm")
        return Run(a.wall + b.wall, a.cpu + b.cpu, max(a.rss, b.rss), b.out)

    def listed(self, disks, vm, day):
        changes(disks, vm, day, self.list)
        return self.cmd("synchronize", "vm", "--changed-extents", "0=" + self.list, "--changed-since", "latest")

    def recover(self, out):
        remove(out)
        return self.cmd("recover", "disk", "vm", "--point", "latest", "--disk", 0, "--to", out, "--no-sync")


class Restic:
    def __init__(self, name, program=None):
        self.repo = path(name)
        remove(self.repo)

    def cmd(self, *words):
        return run(A.restic, "-q", "-r", self.repo, *words)

    def full(self, disk):
        a, b = self.cmd("init"), self.cmd("backup", disk)
        return Run(a.wall + b.wall, a.cpu + b.cpu, max(a.rss, b.rss), b.out)


class Rustic:
    def __init__(self, name):
        self.repo = path(name)
        remove(self.repo)

    def full(self, disk):
        a = run(A.rustic, "--log-level", "error", "-r", self.repo, "init", "--set-compression", 3)
        b = run(A.rustic, "--log-level", "error", "-r", self.repo, "backup", disk)
        return Run(a.wall + b.wall, a.cpu + b.cpu, max(a.rss, b.rss), b.out)


def path(name):
    return os.path.join(A.work, name)


# --- results ----------------------------------------------------------------------------------------------------------

RESULTS = {}     # row -> (bar text, bar number or None, "<=" or ">=", list of values, unit)
PEAK = {}


def note(row, bar, sense, value, unit="x"):
    RESULTS.setdefault(row, (bar, sense, [], unit))[2].append(value)
    say("%s: %.3f %s (bar %s %s)" % (row, value, unit, sense, bar))


def peak(row, *runs):
    PEAK[row] = max([PEAK.get(row, 0)] + [r.rss for r in runs])


def floor_of(disk):
    """What the machine's limit says of a disk, now: CPU seconds of one thread."""
    floor = json.loads(run(A.floor, disk).out.strip().splitlines()[-1])
    for kind, rate in (("pipeline", "pipeline_3"), ("decode", "decode_3")):
        floor[kind + "_cpu"] = floor["nonzero_bytes"] / floor[rate] / 1e6
    return floor


# --- rows -------------------------------------------------------------------------------------------------------------

def rows_of_a_life(seed):
    """Full, days 2 to 5, recover, verify, prune: one pool and one repository through a life, in turn."""
    disks = workload(seed, A.size_mib, "vm1,vm2,vm3", 5)
    disk = path("vm.raw")
    generator("at", disks, "vm1", 1, disk)
    warm(disk)
    for _ in range(A.warmups):      # memory that was never touched costs whoever touches it first
        Restic("warm").full(disk)
        Ours("warm-ours", disk).protect()
    theirs, ours = Restic("restic"), Ours("ours", disk)
    r = theirs.full(disk)
    z = run("zstd", "-q", "-f", "-3", "-T2", disk, "-o", path("z.zst"))
    remove(path("z.zst"))
    before = floor_of(disk)
    o = ours.protect()
    peak("full", o)
    # The machine's speed drifts over minutes, so the limit is measured on both sides of what is held against it.
    floor_cpu = (before["pipeline_cpu"] + floor_of(disk)["pipeline_cpu"]) / 2
    if want("full"):
        note("full backup, CPU / restic", 0.38, "<=", o.cpu / r.cpu)
        if A.rustic:
            note("full backup, CPU / rustic", 0.48, "<=", o.cpu / Rustic("rustic").full(disk).cpu)
        note("full backup, CPU / floor of the same level", 1.3, "<=", o.cpu / floor_cpu)
        note("full backup, wall / zstd -3 -T2", 1.0, "<=", o.wall / z.wall)
    if want("size"):
        note("pool after day 1 / restic", 1.02, "<=", size(ours.data) / size(theirs.repo))
    if want("tls"):
        # Single pairs spread by half their value, so the median of three stands for a seed.
        pairs = []
        for _ in range(3):
            t = over_tls(disk)
            beside = Ours("tls-beside", disk)
            pairs.append(t / beside.protect().cpu)
            remove(beside.data)
        note("full over TLS, CPU of server and agent / standalone", 1.5, "<=", sorted(pairs)[1])
    for day in range(2, 6):
        generator("step", disks, "vm1", day, disk)
        warm(disk)
        before = size(theirs.repo), size(ours.data)
        r = theirs.cmd("backup", disk)
        o = ours.listed(disks, "vm1", day)
        peak("day 2", o)
        if day == 2 and want("day2"):
            note("day 2 by change list, CPU / restic's scan", 0.13, "<=", o.cpu / r.cpu)
            note("day 2 by change list, wall / restic's scan", 0.15, "<=", o.wall / r.wall)
        if day > 2 and want("day2"):
            note("days 3 to 5 by change list, CPU / restic's scan", None, "<=", o.cpu / r.cpu)
        if want("growth"):
            grown = size(theirs.repo) - before[0], size(ours.data) - before[1]
            note("growth on day %d, vm1 / restic" % day, 0.45, "<=", grown[1] / grown[0])
    if want("recover"):
        out, cp = path("out.raw"), path("cp.raw")
        target = path("restored")
        rounds = []
        before = floor_of(disk)
        for _ in range(4):
            remove(target, cp)
            r = theirs.cmd("restore", "latest", "--sparse", "--target", target)
            remove(target)
            c = run("cp", "--sparse=always", disk, cp)
            remove(cp)
            o = ours.recover(out)
            rounds.append((o.wall / r.wall, o.cpu, c.cpu))
        decode_cpu = (before["decode_cpu"] + floor_of(disk)["decode_cpu"]) / 2
        generator("check", disks, "vm1", 5, out)
        remove(out)
        peak("recover", o)
        # The first round only touches the memory.
        wall, cpu, cp_cpu = (statistics.median(values) for values in zip(*rounds[1:]))
        note("recover the latest, wall / restic", 0.8, "<=", wall)
        note("recover the latest, CPU / (decode floor + cp)", 1.5, "<=", cpu / (decode_cpu + cp_cpu))
    if want("verify"):
        r = theirs.cmd("check", "--read-data")
        o = ours.cmd("pool", "verify", "--read-data")
        peak("verify", o)
        note("verify --read-data, CPU / restic check --read-data", 0.5, "<=", o.cpu / r.cpu)
    if want("reads") and A.examples and os.path.exists(os.path.join(A.examples, "read_speed")):
        j = json.loads(run(os.path.join(A.examples, "read_speed"), os.path.join(ours.data, "pool"), ours.kit).out
                       .strip().splitlines()[-1])
        note("random 4 KiB reads a second of a core", 3000, ">=", j["random_reads_per_cpu_second"], "/s")
        note("sequential reading, MB a CPU second", 800, ">=", j["sequential_mb_per_cpu_second"], "MB/s")
        note("sequential reading, rate / the decode floor's", None, ">=",
             j["sequential_mb_per_cpu_second"] / floor_of(disk)["decode_3"])
    if want("prune"):
        # A day first; then all but the newest, where there is more to rewrite.
        for keep, what in ((4, "a day"), (1, "all days but the last")):
            r = theirs.cmd("forget", "--keep-last", keep, "--prune", "--max-unused", "0")
            p = ours.cmd("prune", "vm", "--keep-last", keep, "--yes")
            q = ours.cmd("pool", "reclaim", "--json")
            peak("prune", p, q)
            note("prune and reclaim of %s, wall / restic forget --prune" % what, 0.5, "<=", (p.wall + q.wall) / r.wall)
            job = [json.loads(line) for line in q.out.splitlines() if line.startswith('{"type":"job"')][-1]
            written, freed = job["bytes_stored"], job["bytes_freed"]
            note("reclaim of %s, bytes rewritten / freed" % what, 1.0, "<=", written / freed if freed else float(written > 0))
            note("reclaim of %s, bytes freed" % what, None, ">=", freed / 1e6, "MB")
            note("pool after the reclaim of %s / restic" % what, None, "<=", size(ours.data) / size(theirs.repo))
    if want("growth"):
        other_machines(disks, theirs, ours)
    remove(theirs.repo, ours.data, disk)


def row_scan(seed):
    """Day 2 with nothing but the disk itself."""
    disks = workload(seed, A.size_mib, "vm1,vm2,vm3", 5)
    disk = path("vm.raw")
    generator("at", disks, "vm1", 1, disk)
    theirs, ours = Restic("restic"), Ours("ours", disk)
    theirs.full(disk)
    ours.protect()
    generator("step", disks, "vm1", 2, disk)
    warm(disk)
    r = theirs.cmd("backup", disk)
    o = ours.cmd("synchronize", "vm", "--full-scan")
    peak("scan", o)
    note("day 2 by full scan, CPU / restic", 0.25, "<=", o.cpu / r.cpu)
    remove(theirs.repo, ours.data, disk)


def other_machines(disks, theirs, ours):
    """A clone beside vm1, and the days of vm2 and vm3, each in fresh repositories but for the clone."""
    for vm, bar in (("vm2", 0.85), ("vm3", 0.6)):
        if not os.path.exists("%s/%s/day1.raw" % (disks, vm)):
            continue
        disk = path(vm + ".raw")
        generator("at", disks, vm, 1, disk)
        if vm == "vm2":
            before = size(theirs.repo), size(ours.data)
            theirs.cmd("backup", disk)
            ours.cmd("datasource", "add-image", "clone", disk)
            ours.cmd("protect", "clone")
            grown = size(theirs.repo) - before[0], size(ours.data) - before[1]
            note("growth by a cloned machine / restic", 1.0, "<=", grown[1] / grown[0])
        them, us = Restic("restic-" + vm), Ours("ours-" + vm, disk)
        them.full(disk)
        us.protect()
        for day in range(2, 6):
            generator("step", disks, vm, day, disk)
            before = size(them.repo), size(us.data)
            them.cmd("backup", disk)
            us.listed(disks, vm, day)
            grown = size(them.repo) - before[0], size(us.data) - before[1]
            note("growth on day %d, %s / restic" % (day, vm), bar, "<=", grown[1] / grown[0])
        remove(them.repo, us.data, disk)


def cpu_of(pid):
    """CPU seconds of a running process, and of its children that ended."""
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def over_tls(disk):
    """CPU of server and agent for one full backup over the loopback."""
    data, kit, state = path("tls-server"), path("tls-kit.txt"), path("tls-agent")
    remove(data, kit, state)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = open(path("tls-server.log"), "wb")
    server = subprocess.Popen([A.program, "server", "run", "--data", data, "--listen", "127.0.0.1:%d" % port,
                               "--recovery-kit", kit], stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=ENV)
    agent = None
    try:
        env = {}
        for _ in range(300):
            time.sleep(0.1)
            with open(path("tls-server.log")) as f:
                env = dict(re.findall(r"export (STILLPOINT_\w+)=(\S+)", f.read()))
            if len(env) >= 3:
                break
        env["STILLPOINT_SERVER"] = "https://127.0.0.1:%d" % port
        made = run(A.program, "host", "token", env=env).out
        token = re.search(r"sp0-\S+", made).group(0)
        run(A.program, "agent", "enroll", "--server", env["STILLPOINT_SERVER"], "--token", token, "--state", state,
            "--name", "bench", env=env)
        agent = subprocess.Popen([A.program, "agent", "run", "--state", state], stdout=log, stderr=log,
                                 stdin=subprocess.DEVNULL, env=ENV)
        for _ in range(100):
            time.sleep(0.1)
            if run(A.program, "datasource", "add-image", "vm", "bench:" + disk, env=env, ok=range(256)).out.find("error") < 0:
                break
        before = cpu_of(server.pid) + cpu_of(agent.pid)
        run(A.program, "protect", "bench/vm", env=env)
        return cpu_of(server.pid) + cpu_of(agent.pid) - before
    finally:
        for child in (agent, server):
            if child:
                child.send_signal(signal.SIGTERM)
                child.wait()
        log.close()
        remove(data, state)


def row_sparse():
    """The cost of one list on ever larger disks."""
    cost = {}
    for gib in (8, 64, 512):
        disk = path("sparse.raw")
        remove(disk)
        with open(disk, "wb") as f:
            f.truncate(gib << 30)
            for n in range(512):
                f.seek(n * (8 << 30) // 512)
                f.write(os.urandom(65536))
        ours = Ours("sparse", disk)
        ours.protect()
        with open(disk, "r+b") as f:
            for n in range(256):
                f.seek(n * (8 << 30) // 256)
                f.write(os.urandom(65536))
        with open(ours.list, "w") as f:
            json.dump([[n * (8 << 30) // 256, 65536] for n in range(256)], f)
        o = ours.cmd("synchronize", "vm", "--changed-extents", "0=" + ours.list, "--changed-since", "latest")
        peak("sparse", o)
        cost[gib] = o.cpu
        remove(disk, ours.data)
    note("the same list on 64 GiB / on 8 GiB, CPU", 1.5, "<=", cost[64] / cost[8])
    note("the same list on 512 GiB / on 8 GiB, CPU", 1.5, "<=", cost[512] / cost[8])


def row_aged(seed):
    """Recovery after 90 increments. The generator's small disk is full after 80 days, so their changes come again."""
    days = 78
    disks = workload(seed, 256, "vm1", days, "small-%d" % seed)
    disk, out = path("small.raw"), path("small-out.raw")
    generator("at", disks, "vm1", 1, disk)
    ours = Ours("aged", disk)
    ours.protect()

    def measure(it):
        times = {}
        for kind in ("warm", "cold"):
            walls = []
            for _ in range(4):
                if kind == "cold":
                    drop(it.data)
                walls.append(it.recover(out).wall)
                remove(out)
            times[kind] = min(walls)
        return times

    first = measure(ours)
    for n in range(90):
        day = 2 + n % (days - 1)
        generator("step", disks, "vm1", day, disk)
        ours.listed(disks, "vm1", day)
    last = measure(ours)
    fresh = Ours("fresh", disk)
    fresh.protect()
    new = measure(fresh)
    for kind in ("warm", "cold"):
        note("recover after 90 increments / a fresh pool of the same disk, %s, wall" % kind, 1.3, "<=", last[kind] / new[kind])
        note("recover after 90 increments / the first day's (the disk has grown), %s, wall" % kind, None, "<=",
             last[kind] / first[kind])
    remove(ours.data, fresh.data, disk)


def row_list():
    """A list of 10,000 points, start-up included."""
    disk = path("tiny.raw")
    with open(disk, "wb") as f:
        f.truncate(4 << 20)
    ours = Ours("many", disk)
    ours.protect()
    with open(ours.list, "w") as f:
        json.dump([[0, 4096]], f)
    for n in range(A.points):
        with open(disk, "r+b") as f:
            f.write(b"day %d" % n)
        ours.cmd("synchronize", "vm", "--changed-extents", "0=" + ours.list, "--changed-since", "latest")
    best = min((ours.cmd("recovery-point", "list", "vm") for _ in range(5)), key=lambda r: r.wall)
    peak("list", best)
    note("list of %d points, start-up included" % A.points, 50, "<=", best.wall * 1000, "ms")
    remove(ours.data)


def row_example(name, *words, fields):
    program = os.path.join(A.examples or "", name)
    if not os.path.exists(program):
        return
    j = json.loads(run(program, *words).out.strip().splitlines()[-1])
    for field, row, bar, sense, unit in fields:
        if field in j:
            note(row, bar, sense, j[field], unit)


# --- peers ------------------------------------------------------------------------------------------------------------

def version_of(program):
    text = subprocess.run([program, "version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    if not found:
        raise Failed("%s does not tell its version: %s" % (program, text))
    return tuple(int(n or 0) for n in found.groups())


def find_restic(given):
    """A restic that is new enough; an older one is refused: it compresses differently and is no fair peer."""
    for program in [given] if given else [os.path.join(A.work, "bin", "restic"), shutil.which("restic")]:
        if program and os.path.exists(program):
            found = version_of(program)
            if found >= (0, 18, 0):
                return program
            if given:
                raise Failed("%s is restic %d.%d.%d, wanted is 0.18 or newer" % ((program,) + found))
    return fetch_restic()


def fetch_restic():
    """Debian's next release has one; its package is unpacked beside the system."""
    say("fetching restic from Debian's next release")
    place, bins = os.path.join(A.work, "next"), os.path.join(A.work, "bin")
    for folder in ("lists/partial", "cache/archives/partial"):
        os.makedirs(os.path.join(place, folder), exist_ok=True)
    os.makedirs(bins, exist_ok=True)
    uri = None
    for folder, _, names in os.walk("/etc/apt"):
        for name in names:
            if name.endswith((".sources", ".list")) and not uri:
                with open(os.path.join(folder, name)) as f:
                    found = re.search(r"^(?:URIs:\s*|deb (?:\[[^]]*\] )?)(https?://\S+)", f.read(), re.M)
                uri = found and found.group(1)
    if not uri:
        raise Failed("no Debian mirror is configured: give --restic PATH (0.18 or newer)")
    with open(os.path.join(place, "sources.list"), "w") as f:
        f.write("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s trixie main\n" % uri)
    options = ["-o", "Dir::Etc::sourcelist=%s/sources.list" % place, "-o", "Dir::Etc::sourceparts=-",
               "-o", "Dir::State::lists=%s/lists" % place, "-o", "Dir::Cache=%s/cache" % place]
    run("apt-get", *options, "-qq", "update")
    run("apt-get", *options, "-qq", "download", "restic", cwd=place)
    package = [n for n in os.listdir(place) if n.startswith("restic_") and n.endswith(".deb")][0]
    run("dpkg-deb", "-x", os.path.join(place, package), os.path.join(place, "unpacked"))
    shutil.copy(os.path.join(place, "unpacked", "usr", "bin", "restic"), os.path.join(bins, "restic"))
    program = os.path.join(bins, "restic")
    if version_of(program) < (0, 18, 0):
        raise Failed("%s is older than 0.18" % program)
    return program


# --- the whole --------------------------------------------------------------------------------------------------------

def want(row):
    return row in A.rows


def table():
    lines = ["| row | bar | median | least to greatest | met |", "|---|---|---|---|---|"]
    for row, (bar, sense, values, unit) in RESULTS.items():
        middle = statistics.median(values)
        met = "-" if bar is None else "yes" if (middle <= bar if sense == "<=" else middle >= bar) else "**no**"
        show = (lambda v: "%.2f" % v) if unit == "x" else (lambda v: "%.1f %s" % (v, unit) if v < 100 else "%d %s" % (v, unit))
        lines.append("| %s | %s | %s | %s to %s | %s |" % (
            row, "-" if bar is None else "%s %s" % (sense, bar), show(middle), show(min(values)), show(max(values)), met))
    if PEAK:
        worst = max(PEAK, key=PEAK.get)
        lines.append("| peak memory of any row (%s) | <= 200 MiB | %d MiB | | %s |" % (
            worst, PEAK[worst], "yes" if PEAK[worst] <= 200 else "**no**"))
    return lines


def machine():
    model = ""
    with open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    restic = ".".join(map(str, version_of(A.restic)))
    return "%s, %d cores; Linux %s; restic %s%s; disks of %d MiB, seeds %s; %s" % (
        model, os.cpu_count(), os.uname().release, restic, ", rustic" if A.rustic else "", A.size_mib,
        ",".join(map(str, A.seeds)), time.strftime("%Y-%m-%d", time.gmtime()))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--program", required=True)
    p.add_argument("--floor", required=True)
    p.add_argument("--examples")
    p.add_argument("--work", default="/var/tmp/stillpoint-bench")
    p.add_argument("--restic")
    p.add_argument("--rustic")
    p.add_argument("--seeds", default="1,2,3")
    p.add_argument("--size-mib", type=int, default=2048)
    p.add_argument("--rows", default=",".join(ALL_ROWS))
    p.add_argument("--points", type=int, default=10000)
    p.add_argument("--chunks", type=int, default=200_000_000)
    p.add_argument("--warmups", type=int, default=1)
    p.add_argument("--out")
    global A, ENV
    A = p.parse_args()
    A.seeds = [int(s) for s in A.seeds.split(",")]
    A.rows = A.rows.split(",")
    unknown = [r for r in A.rows if r not in ALL_ROWS]
    if unknown:
        p.error("unknown rows: %s; there are %s" % (" ".join(unknown), " ".join(ALL_ROWS)))
    os.makedirs(A.work, exist_ok=True)
    home = os.path.join(A.work, "home")
    os.makedirs(home, exist_ok=True)
    ENV = dict(os.environ, HOME=home, XDG_CACHE_HOME=home, XDG_CONFIG_HOME=home, RESTIC_PASSWORD="bench",
               RUSTIC_PASSWORD="bench", RUSTIC_NO_PROGRESS="true", LC_ALL="C")
    for name in [n for n in ENV if n.startswith("STILLPOINT_")]:
        del ENV[name]
    try:
        A.restic = find_restic(A.restic)
        beside = os.path.join(A.work, "bin", "rustic")
        A.rustic = A.rustic or (beside if os.path.exists(beside) else shutil.which("rustic"))
        for seed in A.seeds:
            if any(want(r) for r in "full tls day2 size growth recover verify reads prune".split()):
                rows_of_a_life(seed)
            if want("scan"):
                row_scan(seed)
        if want("sparse"):
            row_sparse()
        if want("aged"):
            row_aged(A.seeds[0])
        if want("list"):
            row_list()
        if want("index"):
            os.makedirs(path("scale"), exist_ok=True)
            row_example("index_scale", "--chunks", A.chunks, "--dir", path("scale"), fields=(
                ("disk_bytes_per_chunk", "index, bytes of runs a chunk", 24, "<=", "B"),
                ("resident_bytes_per_chunk", "index, bytes in memory a chunk", 2.0, "<=", "B"),
                ("ids_per_cpu_second", "index, ids looked up a second of a core", 300_000, ">=", "/s")))
        if want("reclaim"):
            os.makedirs(path("scale"), exist_ok=True)
            row_example("reclaim_scale", "--chunks", A.chunks, "--dir", path("scale"), fields=(
                ("anew_peak_mib_at_1e9", "reclaim at 10^9 chunks, counted anew, memory by the measured slope", 1024,
                 "<=", "MiB"),
                ("follow_peak_mib_at_1e9", "the same, counts followed", 1024, "<=", "MiB"),
                ("mark_peak_mib_at_1e9", "the same, full mark", 1024, "<=", "MiB")))
    except Failed as error:
        say(str(error))
        return 1
    text = "\n".join([machine() + ".", ""] + table()) + "\n"
    print(text)
    if A.out:
        with open(A.out, "w") as f:
            f.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
