// Package checkpoint reads and writes the weights of models, and knows what the
// checkpoints of MAR and of KL and VQ tokenizers contain. diffusers' names are
// translated to LDM's when a file is opened.
//
// Two containers are read through one type, File: safetensors, and the zip
// archives that torch.save writes (.pth, .pt, .ckpt). Which one a file is is
// told by its content, never by its name. Both are mapped into memory; tensors
// are copied out, converted on the way, and their pages can be given back
// afterwards, so loading a model needs little more memory than the model.
//
// Files come from strangers. Headers, archives and pickles are read under
// limits, nothing in a pickle is ever imported or executed, every offset is
// checked against the file, and a file that is truncated while it is mapped
// gives an error instead of a signal. Errors are *engine.Error: Kind IO for a
// file that is damaged or not what it should be, Kind Invalid where the caller
// must choose or supply something.
//
// MARConfig and KLConfig list each model's tensors by name and shape. Check
// compares a file with such a list, so that nothing is ever left at random
// values; Convert turns any readable file into safetensors that carries its
// configuration.
package checkpoint
