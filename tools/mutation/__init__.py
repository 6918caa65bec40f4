"""What tools/mutants.py is made of: mutators of C++ and Python source, and the pytest session that runs one mutant."""
