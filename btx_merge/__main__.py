"""`python -m btx_merge` is `btx`; so accelerate and torchrun can start it as a module."""

from btx_merge.cli import main

main()
