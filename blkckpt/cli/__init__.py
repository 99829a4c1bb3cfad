"""The command line: one module a verb, no logic of its own.

A verb reads its arguments, calls the package that does the work, and prints the result.  What is shared:

=================  ==================================================================================
:mod:`.main`       finds the verb (its module is imported only then); errors become one line and a code
:mod:`.session`    the home, its VMs, its store (made on first need), progress
:mod:`.names`      ``VM@CKPT`` and ``[ID=]PATH[:SIZE]``, parsed; looks at no file
:mod:`.verb`       examples and JSON keys in the help, common arguments, confirmations
:mod:`.output`     results on standard output: tables, fields, JSON
:mod:`.live`       a text shown again and again, until Ctrl-C
:mod:`.complete`   what the shell offers for an argument, by its metavar
:mod:`.manual`     man pages from the commands themselves
:mod:`.progress`   bytes, rate, time left on standard error: bars on a terminal, else a line now and then
=================  ==================================================================================

Rules
-----
* **C1** Results go to standard output, everything else to standard error.  With ``--json`` standard output is one
  JSON document, whose keys the verb's help lists; keys are added, never renamed or removed.
* **C2** Every error is one line ``blkckpt: …`` on standard error and an exit code from the table in
  :mod:`blkckpt.errors`.  A traceback is shown with ``--debug`` only.
* **C3** Ctrl-C and SIGTERM unwind: what the verb opened is closed, a checkpoint under way is taken back (rule A3),
  and the exit code is 130 or 143.  A reader of the output that went away (``| head``) ends the verb quietly with 141.
* **C4** A user never needs the path of a socket, a layer or an image; VMs and checkpoints are named.
* **C5** What loses data asks first.  Without a terminal only ``--yes`` answers.
"""
