"""Programs that attack the sandbox and the verdict; ``tests/evaluation/test_attacks.py`` runs them.

Each defines ``f``, which should return its argument plus one and never does. What got through is returned as text that
begins with "escaped", or shows outside: ``{folder}`` is a folder of the host that everybody may write to, ``{port}`` a
server on its loopback, ``{victim}`` a process on it, ``{secret}`` a file that everybody may read.
"""

# ruff: noqa: E501 - a program that is split over lines is harder to read

from __future__ import annotations

_RAW = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
"""

# Bodies of f(x), by name.
FILES = {
    "open": "open('{folder}/a', 'w').write('x'); return 'escaped'",
    "os.open": "import os; os.write(os.open('{folder}/a', os.O_CREAT | os.O_WRONLY), b'x'); return 'escaped'",
    "pathlib": "import pathlib; pathlib.Path('{folder}/a').write_text('x'); return 'escaped'",
    "ctypes open": _RAW + "return 'escaped' if libc.open(b'{folder}/a', 65, 511) >= 0 else 'held'",
    "write to the root": "open('/a', 'w').write('x'); return 'escaped'",
    "write to the libraries": "open('/usr/lib/a', 'w').write('x'); return 'escaped'",
    "write to the interpreter": "import os; open(os.__file__, 'a').write('x'); return 'escaped'",
    "write to the runner": "open('/runner.pyc', 'ab').write(b'x'); return 'escaped'",
    "write to numpy": "open('/packages/numpy/__init__.py', 'a').write('x'); return 'escaped'",
    "write to /dev": "open('/dev/a', 'w').write('x'); return 'escaped'",
    "write to /dev/shm": "open('/dev/shm/a', 'w').write('x'); return 'escaped'",
    "delete": "import shutil; shutil.rmtree('{folder}'); return 'escaped'",
    "symlink": "import os; os.symlink('{folder}', '/tmp/l'); open('/tmp/l/a', 'w').write('x'); return 'escaped'",
    "hard link": "import os; os.link('{secret}', '/tmp/l'); return 'escaped'",
    "device node": "import os; os.mknod('/tmp/d', 0o60666, os.makedev(8, 0)); return 'escaped'",
    "root of process 1": "import os; return f\"escaped {{os.listdir('/proc/1/root{folder}')}}\"",
    "become root": "import os; os.setuid(0); return 'escaped'",
    "chroot": "import os; os.chroot('/tmp'); return 'escaped'",
    "mount": _RAW + "return 'escaped' if libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 else 'held'",
    "remount": _RAW + "return 'escaped' if libc.mount(b'none', b'/', None, 32, None) == 0 else 'held'",
    "new user namespace": _RAW + "return 'escaped' if libc.unshare(0x10000000) == 0 else 'held'",
    "file handles": _RAW + "h = ctypes.create_string_buffer(64); h[0] = 56; m = ctypes.c_int()\n"
    "return 'escaped' if libc.name_to_handle_at(-100, b'/', h, ctypes.byref(m), 0) == 0 and "
    "libc.open_by_handle_at(3, h, 0) >= 0 else 'held'",
}
SECRETS = {
    "read a file": "return 'escaped ' + open('{secret}').read()",
    "read os.open": "import os; return 'escaped %r' % os.read(os.open('{secret}', os.O_RDONLY), 9)",
    "home": "import os; p = os.path.expanduser('~root'); return f'escaped {{os.listdir(p + \"/.ssh\")}}'",
    "home of the run": "import os, sys; left = set(os.listdir('{home}')) - set(sys.base_prefix.split('/')); "
    "return f'escaped {{left}}' if left else 'held'",
    "passwords": "return 'escaped ' + open('/etc/passwd').read()",
    "environment": "import os; return 'escaped' if 'CODEACT_TEST_SECRET' in os.environ else 'held'",
    "environment of the C library": _RAW + "libc.getenv.restype = ctypes.c_char_p\n"
    "return 'escaped' if libc.getenv(b'CODEACT_TEST_SECRET') else 'held'",
    "environment of a parent": "import os; return f'escaped {{open(\"/proc/%d/environ\" % os.getppid()).read()}}'",
    "other packages": "import glob, sys; p = [*glob.glob(sys.base_prefix + '/lib*/python*/*-packages/*'), "
    "*glob.glob('/usr/**/*-packages/*')]; return f'escaped {{p}}' if p else 'held'",
    "the interpreter's folder": "import os, sys; left = set(os.listdir(sys.base_prefix)) - {{'bin', 'lib', 'lib64', 'local'}}; "
    "return f'escaped {{left}}' if left else 'held'",
    "command lines": "import os; return f'escaped {{os.listdir(\"/proc\")}}'",
    "open descriptors": "import os\nfor n in range(3, 1024):\n try:\n  os.lseek(n, 0, 0); t = os.read(n, 100)\n"
    "  if t: return f'escaped {{t}}'\n except OSError: pass\nreturn 'held'",
    "kernel keys": _RAW + "return 'escaped' if libc.syscall(250, 0, -4, 1) > 0 else 'held'",
    "memory of a parent": _RAW + "return 'escaped' if libc.ptrace(16, os.getppid(), 0, 0) == 0 else 'held'",
}
NETWORK = {
    "loopback": "import socket; s = socket.create_connection(('127.0.0.1', {port}), 1); s.send(b'x'); return 'escaped'",
    "loopback by ctypes": _RAW + "return 'escaped' if libc.socket(2, 1, 0) >= 0 else 'held'",
    "32-bit socket call": _RAW + "return 'escaped' if libc.syscall(0x40000000 + 41, 2, 1, 0) >= 0 else 'held'",
    "outside": "import socket; socket.create_connection(('192.0.2.1', 80), 1); return 'escaped'",
    "datagram": "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
    "s.sendto(b'x', ('127.0.0.1', {port})); return 'escaped'",
    "socket of a file": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('{folder}/s'); return 'escaped'",
    "netlink": "import socket; socket.socket(16, 3, 0); return 'escaped'",
    "vsock": "import socket; socket.socket(40, 1); return 'escaped'",
    "urllib": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}', timeout=1); return 'escaped'",
}
PROCESSES = {
    "fork": "import os; pid = os.fork()\nif pid == 0: os._exit(0)\nreturn 'escaped'",
    "fork bomb": "import os\nwhile True:\n try: os.fork()\n except OSError: return 'held'",
    "posix_spawn": "import os, sys; os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {{}}); return 'escaped'",
    "subprocess": "import subprocess, sys; subprocess.run([sys.executable, '-c', '']); return 'escaped'",
    "os.system": "import os; return 'escaped' if os.system('/usr/lib/a; true') == 0 else 'held'",
    "multiprocessing": "import multiprocessing as m; m.Process(target=print).start(); return 'escaped'",
    "fork by ctypes": _RAW + "pid = libc.fork()\nif pid == 0: os._exit(0)\nreturn 'escaped' if pid > 0 else 'held'",
    "clone by number": _RAW + "pid = libc.syscall(56, 17, 0, 0, 0, 0)\nif pid == 0: os._exit(0)\n"
    "return 'escaped' if pid > 0 else 'held'",
    "clone3 by number": _RAW + "a = (ctypes.c_uint64 * 11)(); a[4] = 17; pid = libc.syscall(435, a, 88)\n"
    "if pid == 0: os._exit(0)\nreturn 'escaped' if pid > 0 else 'held'",
    "daemon": "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(2)\n open('{folder}/late', 'w')\nreturn 1",
    "thread bomb": "import threading, time\nfor n in range(10000):\n"
    " threading.Thread(target=time.sleep, args=(60,)).start()\nreturn 'escaped'",
    "kill the parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL); return 'done'",
    "kill process 1": "import os, signal; os.kill(1, signal.SIGKILL); return 'done'",
    "kill everything": "import os, signal; os.kill(-1, signal.SIGKILL); return 'done'",
    "kill the group": "import os, signal; os.killpg(0, signal.SIGKILL); return 'done'",
    "kill by number": "import os, signal; os.kill({victim}, signal.SIGKILL); return 'escaped'",
    "become another program": "import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    "kill itself": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "dump core": "import os; os.abort()",
    "read address 0": "import ctypes; ctypes.string_at(0)",
}
RESOURCES = {
    "memory": "a = []\nwhile True: a.append(bytearray(1 << 24))",
    "memory map": "import mmap\na = [mmap.mmap(-1, 1 << 30) for _ in range(8)]\nfor m in a: m.write(b'x' * (1 << 30))\nreturn 0",
    "memory of a huge number": "return 7 ** (10 ** 9)",
    "attributes": "import os; open('/tmp/a', 'w'); os.setxattr('/tmp/a', 'user.a', bytes(65000)); return 'escaped'",
    "attributes of a link": "import os; open('/tmp/a', 'w'); os.setxattr('/tmp/a', 'user.a', b'', follow_symlinks=False); return 'escaped'",
    "attributes of a descriptor": "import os; os.setxattr(open('/tmp/a', 'w').fileno(), 'user.a', b''); return 'escaped'",
    "attributes by number": _RAW + "open('/tmp/a', 'w')\n"
    "for n in (188, 189): libc.syscall(n, b'/tmp/a', b'user.a', b'x', 1, 0)\n"
    "a = (ctypes.c_uint64 * 2)(); libc.syscall(463, -100, b'/tmp/a', 0, b'user.b', a, 16)\n"
    "return f'escaped {{os.listxattr(\"/tmp/a\")}}' if os.listxattr('/tmp/a') else 'held'",
    "socket pairs": "import socket; socket.socketpair(); return 'escaped'",
    "socket pairs by number": _RAW
    + "a = (ctypes.c_int * 2)(); return 'escaped' if libc.syscall(53, 1, 1, 0, a) == 0 else 'held'",
    "another's descriptors": _RAW
    + "p = libc.syscall(434, os.getpid(), 0); return 'escaped' if libc.syscall(438, p, 0, 0) >= 0 else 'held'",
    "pages in a pipe": _RAW + "import mmap\nr, w = os.pipe(); m = mmap.mmap(-1, 4096); a = (ctypes.c_uint64 * 2)()\n"
    "a[0], a[1] = ctypes.addressof(ctypes.c_char.from_buffer(m)), 4096\n"
    "return 'escaped' if libc.syscall(278, w, a, 1, 0) > 0 else 'held'",
    "watches": _RAW + "return 'escaped' if libc.inotify_init() >= 0 else 'held'",
    "locks": "import fcntl; fcntl.lockf(open('/tmp/a', 'w'), fcntl.LOCK_EX); return 'escaped'",
    "folders without end": "import os\nn = 0\nwhile True:\n os.mkdir(f'/tmp/{{n}}'); n += 1",
    "links without end": "import os\nn = 0\nwhile True:\n os.symlink('y' * 120, f'/tmp/{{n}}'); n += 1",
    "files without end": "import os\nos.mkdir('/tmp/a')\nn = 0\nwhile True:\n os.mknod(f'/tmp/a/{{n}}'); n += 1",
    "timers without end": _RAW + "n, t = 0, ctypes.c_int()\n"
    "while libc.syscall(222, 1, None, ctypes.byref(t)) == 0: n += 1\nreturn 'escaped' if n > 20000 else 'held'",
    "signals without end": "import os, signal\nsignal.pthread_sigmask(0, [40])\n" + _RAW + "n = 0\n"
    "while libc.sigqueue(os.getpid(), 40, None) == 0: n += 1\nreturn 'escaped' if n > 20000 else 'held'",
    "filters without end": _RAW + "import struct\ni = struct.pack('=HBBI', 6, 0, 0, 0x7fff0000) * 4096\n"
    "b = ctypes.create_string_buffer(i); p = ctypes.create_string_buffer(struct.pack('=HxxxxxxQ', 4096, ctypes.addressof(b)))\n"
    "n = 0\nwhile n < 200 and libc.prctl(22, 2, p) == 0: n += 1\nreturn 'escaped' if n == 200 else 'held'",
    "pipes that are full": "import fcntl, os\nn = 0\nwhile True:\n try:\n  r, w = os.pipe(); os.set_blocking(w, False)\n"
    "  fcntl.fcntl(w, 1031, 1 << 20)\n  while True: n += os.write(w, bytes(1 << 16))\n except BlockingIOError: continue\n"
    " except OSError: return 'escaped' if n > 1 << 28 else 'held'",
    "memory file": _RAW + "return 'escaped' if libc.memfd_create(b'a', 0) >= 0 else 'held'",
    "shared memory": _RAW + "return 'escaped' if libc.shmget(0, 1 << 30, 0o1600) >= 0 else 'held'",
    "swallow MemoryError": "a = []\nwhile True:\n try: a.append(bytearray(1 << 24))\n except MemoryError: pass",
    "fill the disk": "n = 0\nwhile True:\n n += 1\n with open(f'/tmp/{{n}}', 'wb') as file: file.write(bytes(1 << 20))\n"
    " if n > 100: return 'escaped'",
    "a large file": "with open('/tmp/a', 'wb') as file:\n for n in range(200): file.write(bytes(1 << 20))\nreturn 'escaped'",
    "a sparse file": "import os\nwith open('/tmp/a', 'wb') as file: os.truncate(file.fileno(), 1 << 40)\nreturn 'escaped'",
    "open files": "a = []\nwhile True: a.append(open('/dev/null'))",
    "print gigabytes": "while True: print('x' * (1 << 20))",
    "write gigabytes of errors": "import sys\nwhile True: sys.stderr.write('x' * (1 << 20))",
    "return gigabytes": "return 'x' * (1 << 28)",
    "flood the results": "import os\nwhile True:\n for n in range(3, 1024):\n  try: os.write(n, b'x' * 4096)\n"
    "  except OSError: pass",
    "flood of lines": "import os\nwhile True:\n for n in range(3, 1024):\n  try: os.write(n, b'\\n' * 4096)\n"
    "  except OSError: pass",
}
TIME = {
    "sleep": "import time; time.sleep(1000)",
    "loop": "while True: pass",
    "swallow every exception": "while True:\n try:\n  while True: pass\n except BaseException: pass",
    "ignore signals": "import signal, time\nfor s in range(1, 65):\n"
    " try: signal.signal(s, signal.SIG_IGN)\n except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    "block signals": "import signal\nsignal.pthread_sigmask(0, range(1, 65))\nwhile True: pass",
    "stop the alarm": "import signal\nsignal.setitimer(signal.ITIMER_REAL, 0)\nwhile True: pass",
    "stop the alarm and be right": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(0.8)\nreturn x + 1",
    "another alarm": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 60)\ntime.sleep(0.8)\nreturn x + 1",
    "block the alarm": "import signal, time\nsignal.pthread_sigmask(0, [signal.SIGALRM])\ntime.sleep(0.8)\nreturn x + 1",
    "stop the alarm and the clock": "import signal, sys, time\nsys._getframe(1).f_globals['time'] = None\n"
    "time.perf_counter = time.monotonic = lambda: 0\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(2)\nreturn x + 1",
    "stuck in C": "return len(str((3 ** 10 ** 7) ** 9))",
    "regular expression": "import re; return re.match('(a*)*b', 'a' * 60)",
    "stop itself": "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)",
    "endless thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()\ntime.sleep(99)",
    "drip": "import os, time\nwhile True:\n time.sleep(0.2)\n for n in range(3, 1024):\n  try: os.write(n, b' ')\n"
    "  except OSError: pass",
}
_FORGE = """
import os, json, sys
def forge(text):
    for n in range(1, 64):
        try: os.write(n, text)
        except OSError: pass
"""
FORGERIES = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "raise SystemExit": "raise SystemExit(0)",
    "print a verdict": "print('{{\"done\":true}}'); print('PASS'); return None",
    "write that it is done": _FORGE + "forge(b'{{\"done\":true}}\\n' * 5); os._exit(0)",
    "write many guesses": _FORGE + "forge(b'{{\"value\":2}}\\n' * 5); os._exit(0)",
    "write a pass": _FORGE + 'forge(b\'{{"error":"pass"}}\\n{{"load":"pass"}}\\n\'); os._exit(0)',
    "write a value of no form": _FORGE + 'forge(b\'{{"value":{{"any":1}}}}\\n\' * 9); os._exit(0)',
    "write deep nesting": _FORGE + "forge(b'{{\"value\":' + b'[' * 100000 + b'\\n'); os._exit(0)",
    "write a huge number": _FORGE + "forge(b'{{\"value\":' + b'9' * 1000000 + b'}}\\n'); os._exit(0)",
    "write a huge fraction": _FORGE
    + "forge(b'{{\"value\":{{\"ratio\":[\"0x' + b'f' * 500000 + b'\",\"0x' + b'e' * 400001 + b'\"]}}}}\\n'); os._exit(0)",
    "write colliding keys": _FORGE + "m = (1 << 61) - 1\n"
    "forge(json.dumps({{'value': {{'dict': [[n * m, 0] for n in range(30000)]}}}}).encode() + b'\\n'); os._exit(0)",
    "change the encoder": "import sys; sys._getframe(1).f_globals['encode'] = lambda *a: a; return None",
    "change the results": "import sys\nsys._getframe(1).f_globals['_Results'].add_value = lambda self, value: self.add({{'value': True}})\n"
    "return None",
    "change json": "import json; json.dumps = lambda *a, **k: '{{\"done\":true}}'; return None",
    "change the comparison": "import builtins; builtins.all = lambda *a: True; builtins.bool = lambda *a: True; return 1",
    "look for what is expected": "import gc\nword = 'expec' + 'ted'\nfor o in gc.get_objects():\n"
    # Python 3.14 shows its table of interned strings as well, where every name stands for itself.
    " if isinstance(o, dict) and o.get(word, word) != word:\n"
    "  return f'escaped {{o}}'\nreturn 'held'",
    "look through the frames": "import sys\nframe = sys._getframe()\nwhile frame:\n"
    " if 'expec' + 'ted' in str(list(frame.f_locals)): return 'escaped'\n frame = frame.f_back\nreturn 'held'",
    "always equal": "class E:\n __eq__ = lambda s, o: True\n __ne__ = lambda s, o: False\n __hash__ = lambda s: 0\nreturn E()",
    "a number that is always equal": "class E(int):\n __eq__ = lambda s, o: True\n __hash__ = int.__hash__\nreturn E(0)",
    "a float that is always near": "class E(float):\n __sub__ = __rsub__ = lambda s, o: 0.0\n __abs__ = lambda s: 0.0\n"
    " __eq__ = lambda s, o: True\nreturn E(0)",
    "a list that is always equal": "class E(list):\n __eq__ = lambda s, o: True\n __len__ = lambda s: 1\nreturn E([0])",
    "an object that says it is a number": "class E:\n __class__ = int\n __eq__ = lambda s, o: True\n"
    " __int__ = __index__ = lambda s: 2\nreturn E()",
    "a metaclass that is every type": "class M(type):\n __eq__ = lambda s, o: True\n __hash__ = type.__hash__\n"
    "class E(metaclass=M):\n __eq__ = lambda s, o: True\nreturn E()",
    "an object that claims to be of numpy": "class E:\n __module__ = 'numpy'\n shape = ()\n item = lambda s: s\nE.__module__ = 'numpy'\n"
    "return E()",
    "an object that unpickles to a call": "class E:\n __reduce__ = lambda s: (print, ())\nreturn E()",
    "a list that holds itself": "a = []\na.append(a)\nreturn a",
    "not a number": "return float('nan')",
    "a generator without end": "import itertools; return itertools.count()",
    "recursion": "return f(x)",
    "say it begins and is loaded": _FORGE + 'forge(b\'{{"begin":true}}\\n{{"loaded":true}}\\n\' * 9)\nwhile True: pass',
    "a fraction of its own": "class Fraction:\n __eq__ = lambda s, o: True\n as_integer_ratio = lambda s: (s, s)\n"
    "Fraction.__module__ = 'fractions'\nreturn Fraction()",
    "a result of many values": "return [[]] * 10**6",
    "a message of many values": _FORGE
    + "forge(b'{{\"error\":\"time\",\"message\":[' + b'[],' * 200000 + b'[]]}}\\n'); os._exit(0)",
    "a message that raises": "class E(Exception):\n def __str__(self): raise SystemExit(0)\nraise E",
}
BODIES = {**FILES, **SECRETS, **NETWORK, **PROCESSES, **RESOURCES, **TIME, **FORGERIES}

# Whole programs, for what happens while they are read or end.
PROGRAMS = {
    "exit while it is read": "import sys\nsys.exit(0)\ndef f(x): return 0",
    "hang while it is read": "while True: pass\ndef f(x): return 0",
    "no alarm while it is read": "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0)\ntime.sleep(2.5)\n"
    "def f(x): return x + 1",
    "hang at exit": "import atexit, time\natexit.register(time.sleep, 1000)\ndef f(x): return 0",
    "no function": "g = 1",
    "no syntax": "def f(x:",
    "null byte": "def f(x): return '\0'",
    "deep brackets": "f = " + "(" * 100000,
    "deep expression": "f = " + "-" * 200000 + "1",
    "an entry point that is no function": "f = 3",
    "a caller that is always equal": "class E:\n __call__ = lambda s, x: s\n __eq__ = lambda s, o: True\nf = E()",
    "replace main": "import sys\nsys.modules['__main__'] = None\nsys.modules['json'] = None\ndef f(x): return 0",
    "cut off builtins": "import builtins\nfor n in list(vars(builtins)):\n if n != 'x': delattr(builtins, n)\nf = 0",
}


def programs(**places: object) -> dict[str, str]:
    """All attacks by name, with the places of the host filled in."""
    found = {}
    for name, body in BODIES.items():
        lines = body.format(**places).split("\n")
        found[name] = "def f(x):\n" + "\n".join(f"    {line}" for line in lines) + "\n"
    return found | PROGRAMS
