"""The torture suite: kills, full disks, damaged and hostile input, through the real entry points; see __main__."""
