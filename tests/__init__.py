"""The tests. To run them against a vendored copy, change the one import below.

`case` has what every test sets up, `server` the scripted server that it asks. By the rooms of rollouts.py:

    Settings, Requests   test_settings
    Errors, Data         test_data
    Reasoning            test_reasoning, test_injection (with Providers), test_reader, test_captures
    Sentences            test_sentences
    Retry, Pacing        test_pacing
    Replies              test_stream (what is whole), test_failures (what is not, and who hears of it),
                         test_faults (frames, labels, tags, fields), test_words (words, waits, quotas)
    Transport            test_transport
    Progress             test_progress
    Caches               test_cache
    Calls                test_scopes (what is sent after a refusal), test_engine (one queue for all),
                         test_concurrency (who shares, who waits, what ends it)
    Client               test_client, test_resample
    Command              test_vendoring (with the file as a whole: alone, in a package, typed)
    all of them          test_machine (file descriptors, disks, imports), test_process (killed, forked, pickled),
                         test_interrupt (Ctrl-C), test_readme, test_example

`python -m tests.soak` and `python -m tests.benchmark` take longer, and are run by hand.
"""

import os
import signal

import rollouts

__all__ = ["rollouts"]

# Whatever proxies, keys and addresses this machine has, they are not for the servers of the tests.
for name in list(os.environ):
    if name.lower().endswith(("_proxy", "_api_key", "_base_url")):
        del os.environ[name]

# A shell starts what it puts into the background with Ctrl-C ignored, which is not what is tested here.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
