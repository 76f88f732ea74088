"""`python -m rlplugins_openrlhf`, for launchers that take a module: `deepspeed --module rlplugins_openrlhf train_dpo ...`."""

from rlplugins_openrlhf.launch import main

main()
