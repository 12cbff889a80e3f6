"""From a finished run to something that runs elsewhere: one file a step, each also a command."""
