"""Reading files of arrays that others saved as pickles, without unpickling them."""
