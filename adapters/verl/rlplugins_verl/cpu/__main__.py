from rlplugins_verl.cpu.launch import main

main()
