//go:build !cgo || !unix

package main

func libraryOpens(string) bool { return false }
