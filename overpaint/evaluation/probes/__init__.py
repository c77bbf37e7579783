"""Ways of bringing an erased concept back, one file each, behind one protocol: see `probe.Probe`."""
