"""What the worker is made of: licences, a bill of materials, known holes. `make audit` runs it."""
