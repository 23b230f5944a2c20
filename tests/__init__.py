NO_SPINNING = {"OMP_WAIT_POLICY": "passive"}  # for programs of a clean environment: threads that wait leave the cores
