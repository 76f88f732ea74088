"""verl 0.9 on a machine without an accelerator, for tests, demonstrations and first steps.

`platform` is loaded by verl in every process (`VERL_USE_EXTERNAL_MODULES`), `rollout` adds the small engine `light`,
`tiny` writes a model and data of a few kilobytes, and `launch` puts the command line together:

    python -m rlplugins_verl.cpu FOLDER [overrides of verl]
"""
