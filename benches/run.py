#!/usr/bin/env python3
"""Data-plane bench: runs each system in turn, several rounds interleaved, prints medians and ratios to `direct` of the same round.
usage: run.py --out DIR --systems direct,ztunnel,... [--rounds 3] [--secs 3] [--pin host|none] [--tests a,b,...]
Every system is a script systems/NAME.sh start|stop (see benches/README.md). Binaries come through the environment (ZTUNNEL_BIN, ENVOY_BIN, AGENT_BIN...)."""
import argparse, json, os, re, resource, signal, statistics, subprocess, sys, time
HERE = os.path.dirname(os.path.abspath(__file__))
ap = argparse.ArgumentParser()
ap.add_argument("--out", required=True); ap.add_argument("--systems", default="direct")
ap.add_argument("--rounds", type=int, default=3); ap.add_argument("--secs", type=float, default=3)
ap.add_argument("--pin", default="host", choices=["host", "none"])
ap.add_argument("--threads", type=int, default=0, help="worker threads per proxy (default 1 with --pin host, 2 with none)")
ap.add_argument("--tests", default="idle,iperf1,iperf8,iperf1r,wrk1,wrk32,wrk128,fix,crr1,crr32,wrkclose,mix,hold1000,hold5000")
ap.add_argument("--rate", type=int, default=2000); ap.add_argument("--nice", type=int, default=0)
ap.add_argument("--perf", default="", help="tests to profile with perf (cpu-clock), one report file per system, test and proxy")
ap.add_argument("--prefix", default="mb"); ap.add_argument("--offload", default="on")
a = ap.parse_args()
OUT = os.path.abspath(a.out); WORK = os.path.join(OUT, "work"); os.makedirs(WORK, exist_ok=True)
NSA, NSB = a.prefix + "A", a.prefix + "B"; IP = "10.2.0.2"
ML = os.environ.get("MESHLOAD", os.path.join(WORK, "meshload"))
if not os.path.exists(ML):
    subprocess.run(["gcc", "-O2", "-o", ML, os.path.join(HERE, "meshload.c"), "-lpthread"], check=True)
_h = resource.getrlimit(resource.RLIMIT_NOFILE)[1]; resource.setrlimit(resource.RLIMIT_NOFILE, (_h, _h))
if a.nice:
    # with sched_autogroup each session is one scheduling group, so a plain nice value only orders processes inside it
    try:
        if os.getpid() != os.getsid(0): os.setsid()
    except PermissionError: pass
    try: open("/proc/self/autogroup", "w").write(str(a.nice))
    except OSError as e: print("autogroup nice not set:", e)
pinA, pinB = (["taskset", "-c", "0"], ["taskset", "-c", "1"]) if a.pin == "host" else ([], [])
env = dict(os.environ, WORK=WORK, NSA=NSA, NSB=NSB, PFX=a.prefix, THREADS=str(a.threads or (1 if a.pin == "host" else 2)),
           RPS="1" if a.pin == "host" else "0", OFFLOAD=a.offload)
if a.pin == "host": env.update(CPUA="0", CPUB="1")
NS = lambda n: ["ip", "netns", "exec", n]
def sysrun(name, verb):
    with open(os.path.join(WORK, "sys.log"), "a") as f:
        return subprocess.run([os.path.join(HERE, "systems", name + ".sh"), verb], env=env, stdout=f, stderr=f, stdin=subprocess.DEVNULL).returncode
def cpu(pids):
    t = 0
    for p in pids:
        try:
            for k in os.listdir(f"/proc/{p}/task"):
                try: t += int(open(f"/proc/{p}/task/{k}/schedstat").read().split()[0])
                except OSError: pass
        except OSError: pass
    return t / 1e9
def rss(pids):
    t = 0
    for p in pids:
        try: t += int(re.search(r"VmRSS:\s+(\d+)", open(f"/proc/{p}/status").read()).group(1))
        except (OSError, AttributeError): pass
    return t / 1024
def pidsof(h):
    try: return [int(x) for x in open(os.path.join(WORK, f"px{h}.pid")).read().split()]
    except OSError: return []
def busy():
    f = [int(x) for x in open("/proc/stat").readline().split()[1:]]
    return (sum(f[:8]) - f[3] - f[4]) / os.sysconf("SC_CLK_TCK")
servers = []
def start_servers():
    conf = os.path.join(WORK, "nginx.conf")
    open(conf, "w").write(f"""worker_processes 1; pid {WORK}/nginx.pid; error_log {WORK}/nginx.err crit; worker_rlimit_nofile 100000;
events {{ worker_connections 20000; }}
http {{ access_log off; keepalive_requests 1000000000; keepalive_timeout 3600s; tcp_nodelay on; server_tokens off;
  server {{ listen 8080 backlog=16384; location / {{ return 200 "{'x'*128}"; default_type text/plain; }} }} }}
""")
    for cmd in (["nginx", "-c", conf, "-g", "daemon off;"], ["iperf3", "-s"], [ML, "server", "9000"]):
        servers.append(subprocess.Popen(NS(NSB) + pinB + cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    time.sleep(0.7)
def server_pids():
    r = []
    for s in servers:
        r.append(s.pid)
        try: r += [int(x) for x in open(f"/proc/{s.pid}/task/{s.pid}/children").read().split()]
        except OSError: pass
    return r
def client(cmd, timeout):
    """run a client in A; returns (stdout, client cpu seconds)"""
    r0 = resource.getrusage(resource.RUSAGE_CHILDREN)
    p = subprocess.run(NS(NSA) + pinA + cmd, capture_output=True, text=True, timeout=timeout)
    r1 = resource.getrusage(resource.RUSAGE_CHILDREN)
    return p.stdout, p.stderr, (r1.ru_utime + r1.ru_stime) - (r0.ru_utime + r0.ru_stime)
def wrk(c, extra=()):
    o, e, cc = client(["wrk", "-t1", f"-c{c}", f"-d{a.secs:.0f}s", "--latency", *extra, f"http://{IP}:8080/"], a.secs + 30)
    def us(m):
        v, u = re.search(r"%s%%\s+([\d.]+)(us|ms|s)" % m, o).groups(); return float(v) * {"us": 1, "ms": 1e3, "s": 1e6}[u]
    n = int(re.search(r"(\d+) requests in", o).group(1)); er = re.search(r"Socket errors: (.*)", o)
    return {"rate": float(re.search(r"Requests/sec:\s+([\d.]+)", o).group(1)), "p50_us": us(50), "p99_us": us(99), "n": n,
            "errors": er.group(1) if er else "", "client_cpu": cc}
def iperf(n, extra=()):
    o, e, cc = client(["iperf3", "-c", IP, "-t", f"{a.secs:.0f}", "-P", str(n), "-J", *extra], a.secs + 30)
    j = json.loads(o)
    if "error" in j: raise RuntimeError(j["error"])
    s = j["end"]["sum_received"]
    return {"gbps": s["bits_per_second"] / 1e9, "gb": s["bytes"] / 1e9, "client_cpu": cc}
def ml(mode, conns, *args):
    o, e, cc = client([ML, mode, IP, "9000", str(conns), f"{a.secs:.0f}", *map(str, args)], a.secs + 90)
    j = json.loads(o.strip().splitlines()[-1]); j["n"] = j["done"]; j["client_cpu"] = cc; return j
def hold(n, sysname):
    p = subprocess.Popen(NS(NSA) + pinA + [ML, "hold", IP, "9000", str(n), "6", "4000"], stdout=subprocess.PIPE, text=True)
    line = p.stdout.readline(); time.sleep(1.5)
    r = {"ready": line.strip(), "rssA": rss(pidsof("A")), "rssB": rss(pidsof("B"))}
    c0 = cpu(pidsof("A") + pidsof("B")); time.sleep(2); r["idle_cpu_frac"] = (cpu(pidsof("A") + pidsof("B")) - c0) / 2
    out = p.stdout.read(); p.wait(timeout=60); r.update(json.loads(out.strip().splitlines()[-1])); return r
def mix():
    bg = subprocess.Popen(NS(NSA) + pinA + ["iperf3", "-c", IP, "-t", f"{a.secs + 2:.0f}", "-P", "2", "-b", "250M", "-J"], stdout=subprocess.PIPE, text=True)
    time.sleep(1); r = ml("rrr", 16, 64, 64, 500); o, _ = bg.communicate(timeout=60)
    try: r["bg_gbps"] = json.loads(o)["end"]["sum_received"]["bits_per_second"] / 1e9
    except Exception: r["bg_gbps"] = 0
    return r
TESTS = {"iperf1": lambda: iperf(1), "iperf8": lambda: iperf(8), "iperf1r": lambda: iperf(1, ["-R"]), "wrk1": lambda: wrk(1), "wrk32": lambda: wrk(32), "wrk128": lambda: wrk(128),
         "fix": lambda: ml("rrr", 32, 64, 64, a.rate), "rr1": lambda: ml("rr", 1, 64, 64), "crr1": lambda: ml("crr", 1, 64, 64), "crr32": lambda: ml("crr", 32, 64, 64),
         "wrkclose": lambda: wrk(32, ["-H", "Connection: close"]), "mix": mix}
results = open(os.path.join(OUT, "results.jsonl"), "a")
def record(sysn, rnd, test, fn):
    pa, pb, sp = pidsof("A"), pidsof("B"), server_pids()
    pf = []
    if test in a.perf.split(","):
        for h, pids in (("A", pa), ("B", pb)):
            if pids:
                o = os.path.join(OUT, f"perf-{sysn}-{test}-{h}"); pf.append((o, subprocess.Popen(["perf", "record", "-q", "-e", "cpu-clock", "-F", "997", "-o", o + ".data", "-p", ",".join(map(str, pids)), "--", "sleep", str(a.secs)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))
        time.sleep(0.3)
    b0, t0, a0, c0, s0 = busy(), time.time(), cpu(pa), cpu(pb), cpu(sp)
    try: r = fn()
    except Exception as e: r = {"failed": repr(e)[:200]}
    w = time.time() - t0
    for o, q in pf:
        q.wait(); open(o + ".txt", "w").write(subprocess.run(["perf", "report", "-i", o + ".data", "--stdio", "--no-children", "--percent-limit", "0.7", "-F", "overhead,dso,symbol"], capture_output=True, text=True).stdout)
    r.update(cpuA=cpu(pa) - a0, cpuB=cpu(pb) - c0, cpuS=cpu(sp) - s0, wall=w)
    ours = r["cpuA"] + r["cpuB"] + r["cpuS"] + r.get("client_cpu", 0)
    r["noise"] = round(max(0, busy() - b0 - ours) / w, 3)          # cores kept busy by anything that is not this run (softirq included)
    px = r["cpuA"] + r["cpuB"]
    if r.get("gb"): r["px_cpu_per_gb"] = px / r["gb"]; r["all_cpu_per_gb"] = ours / r["gb"]
    if r.get("n"): r["px_us_per_op"] = px / r["n"] * 1e6; r["all_us_per_op"] = ours / r["n"] * 1e6
    r.update(system=sysn, round=rnd, test=test)
    results.write(json.dumps(r) + "\n"); results.flush()
    key = {k: (round(v, 3) if isinstance(v, float) else v) for k, v in r.items() if k in ("gbps", "rate", "p50_us", "p99_us", "px_cpu_per_gb", "px_us_per_op", "noise", "failed", "rssA", "rssB", "errors", "errs")}
    print(f"[{rnd}] {sysn:14s} {test:9s} {key}", flush=True)
def ready(sysn):
    for i in range(40):
        p = subprocess.run(NS(NSA) + [ML, "rr", IP, "9000", "1", "0.02", "64", "64"], capture_output=True, text=True)
        if p.returncode == 0 and '"errs":0' in p.stdout and '"done":0' not in p.stdout: return True
        time.sleep(0.25)
    return False
TARGET = os.path.join(WORK, "target")
def with_system(sysn, rnd, body):
    global IP
    if os.path.exists(TARGET): os.remove(TARGET)
    if sysrun(sysn, "start") != 0: print("start failed:", sysn, open(os.path.join(WORK, "sys.log")).read()[-500:]); sysrun(sysn, "stop"); return
    IP = open(TARGET).read().strip() if os.path.exists(TARGET) else "10.2.0.2"   # a system that captures virtual addresses only names one
    try:
        if not ready(sysn): print("never became ready:", sysn); return
        body()
    finally: sysrun(sysn, "stop"); time.sleep(0.7)
tests = a.tests.split(","); systems = a.systems.split(",")
subprocess.run([os.path.join(HERE, "topo.sh"), "up"], env=env, check=True)
try:
    start_servers()
    for rnd in range(1, a.rounds + 1):
        for s in systems:
            def body():
                if "idle" in tests: time.sleep(1); record(s, rnd, "idle", lambda: {"rssA": rss(pidsof("A")), "rssB": rss(pidsof("B"))})
                for t in tests:
                    if t in TESTS: record(s, rnd, t, TESTS[t])
            with_system(s, rnd, body)
            for t in tests:
                if t.startswith("hold") and s != "direct":   # memory is read on a fresh process each time
                    with_system(s, rnd, lambda: record(s, rnd, t, lambda: hold(int(t[4:]), s)))
finally:
    for s in servers: s.terminate()
    subprocess.run([os.path.join(HERE, "topo.sh"), "down"], env=env)
subprocess.run([sys.executable, os.path.join(HERE, "summary.py"), os.path.join(OUT, "results.jsonl")])
