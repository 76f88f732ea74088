"""OpenRLHF 0.11 on a machine without an accelerator, for tests, demonstrations and first steps.

`platform` makes the CPU do where OpenRLHF, DeepSpeed and vLLM take a device for granted; the folder `site` on PYTHONPATH loads
it in every process, those that vLLM starts included. `tiny` writes a model and data of a few kilobytes, and `launch` puts
the command line together:

    python -m rlplugins_openrlhf.cpu FOLDER [flags of OpenRLHF]
"""
