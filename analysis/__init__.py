from experiment import machine

machine.prepare()  # before anything imports matplotlib
