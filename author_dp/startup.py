"""Make a program's imports faster, interruptible and, where they take long, visible: import this module before all others.

Garbage collection finds nothing while libraries are imported, and takes a fifth of the import's time. Without it, imports took
4.3 s instead of 5.5 s on two CPU cores. A Ctrl-C during imports would print a traceback, or a library's `except` would swallow
it. Here it ends the program. On a busy machine, imports take longer than five seconds: then a line says so. Call
`finish_startup` after the imports: it undoes all of this.

Before torch is imported, its allocator of GPU memory is told to grow its blocks: microbatches of several lengths would otherwise
leave memory in pieces of which none is large enough. And oneDNN is told not to use AMX, whose products mix authors in
bfloat16 (author_dp/guards/precision.py).
"""

import gc
import os
import signal
import sys
import threading

if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which torch still reads
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")  # of no effect on processors without AMX

gc.disable()
_line = threading.Timer(5.0, print, ["[author_dp] Loading libraries."], {"file": sys.stderr, "flush": True})
_line.daemon = True  # an import that fails does not wait for it
if os.environ.get("RANK", "0") == "0":
    _line.start()
_handler = None
if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    _handler = signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish_startup() -> None:
    """Collect garbage of new objects again, let Ctrl-C raise KeyboardInterrupt again, and keep quiet."""
    global _handler
    _line.cancel()
    gc.freeze()
    gc.enable()
    if _handler is not None:
        signal.signal(signal.SIGINT, _handler)
        _handler = None
