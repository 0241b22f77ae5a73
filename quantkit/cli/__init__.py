"""The command line: parses, calls one function of a room below, shows what comes back.

    main.py       the verbs, and how an error becomes one line and an exit code
    options.py    flags that several verbs share, and how their values are read
    screen.py     where results and notes go, how sizes and times look, silence for chatty libraries
    progress.py   a run on a terminal (bars) or in a log file (one line per block)
    quantize.py, evaluate.py, inspect.py, methods.py, generate.py    one verb each

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 misused, 130 interrupted.
torch and transformers are imported inside the verbs that need them, so that ``quantkit --help`` is quick.
"""
