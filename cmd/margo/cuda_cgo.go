//go:build cgo && unix

package main

/*
#cgo linux LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

static int opens(const char *name) {
	void *h = dlopen(name, RTLD_LAZY | RTLD_LOCAL);
	if (h) dlclose(h);
	return h != 0;
}
*/
import "C"

import "unsafe"

// libraryOpens reports whether the dynamic loader finds and loads a library.
func libraryOpens(name string) bool {
	s := C.CString(name)
	defer C.free(unsafe.Pointer(s))
	return C.opens(s) != 0
}
