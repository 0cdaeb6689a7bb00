"""What the package ships: scenarios and the embedded tokenizer, with the programs that build it."""
