from rlplugins_openrlhf.cpu.launch import main

main()
