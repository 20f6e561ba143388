"""Safe ways with what others wrote: files are read within bounds, and text is printed so that it steers nothing."""
