// Package repo_test checks rules about the repository itself: what a reviewer
// would otherwise have to remember.
package repo_test

import (
	"bufio"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const maxLines = 800

// sources calls f for every source file of the project.
func sources(t *testing.T, f func(path string)) {
	t.Helper()
	n := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") && d.Name() != ".ci" || d.Name() == "testdata" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		switch filepath.Ext(path) {
		case ".go", ".c", ".h", ".cpp", ".cu", ".cuh", ".py", ".sh":
			n++
			f(path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if n < 20 {
		t.Fatalf("only %d source files found: the walk is broken", n)
	}
}

func TestFilesAreShort(t *testing.T) {
	sources(t, func(path string) {
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		lines := 0
		for s := bufio.NewScanner(file); s.Scan(); {
			lines++
		}
		if lines > maxLines {
			t.Errorf("%s has %d lines, more than %d: split it by what it does", path, lines, maxLines)
		}
	})
}

// allowed lists, for each package, which of margo's packages it may import.
// Imports point inwards: the vocabulary knows nothing, devices know the
// vocabulary, models know no device.
var allowed = map[string][]string{
	"engine":             {},
	"engine/ref":         {"engine"},
	"engine/dist":        {"engine"},
	"engine/plan":        {"engine"},
	"engine/conformance": {"engine", "engine/ref", "engine/plan"},
	"cpu":                {"engine"},
	"cuda":               {"engine", "engine/atomicfile"},
	"cuda/ptx":           {},
	"engine/testkit":     {"engine", "engine/checkpoint", "engine/load", "engine/mar"},
	"engine/atomicfile":  {"engine"},
	"engine/checkpoint":  {"engine", "engine/atomicfile"},
	"engine/load":        {"engine", "engine/checkpoint"},
	"engine/nn":          {"engine"},
	"engine/diffusion":   {"engine"},
	"engine/imageio":     {"engine", "engine/atomicfile"},
	"engine/tokenizer":   {"engine", "engine/nn", "engine/checkpoint"},
	"engine/mar":         {"engine", "engine/nn", "engine/diffusion", "engine/checkpoint"},
	"engine/dit":         {"engine", "engine/nn", "engine/checkpoint"},
	"engine/verify": {"engine", "engine/checkpoint", "engine/diffusion", "engine/dit", "engine/load", "engine/mar", "engine/ref",
		"engine/sample", "engine/tokenizer"},
	"engine/sample": {"engine", "engine/nn", "engine/diffusion", "engine/dit", "engine/mar", "engine/tokenizer",
		"engine/plan", "engine/checkpoint", "engine/load"},
}

func TestImportsPointInwards(t *testing.T) {
	seen := map[string]bool{}
	sources(t, func(path string) {
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return
		}
		pkg := filepath.ToSlash(filepath.Dir(path))
		may, ok := allowed[pkg]
		if !ok {
			// The program itself and what only it uses may import anything.
			if pkg != "models" && pkg != "bench" && !strings.HasPrefix(pkg, "cmd/") {
				t.Errorf("package %s is not in the table of imports", pkg)
			}
			return
		}
		seen[pkg] = true
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, imp := range file.Imports {
			name := strings.Trim(imp.Path.Value, `"`)
			ours, ok := strings.CutPrefix(name, "margo/")
			if !ok {
				continue
			}
			found := false
			for _, a := range may {
				found = found || a == ours
			}
			if !found {
				t.Errorf("%s imports %s, which package %s must not know", path, name, pkg)
			}
		}
	})
	for pkg := range allowed {
		if !seen[pkg] {
			t.Errorf("package %s is in the table of imports but not in the tree", pkg)
		}
	}
}

func TestPackagesAreDocumented(t *testing.T) {
	documented := map[string]bool{}
	sources(t, func(path string) {
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
			return
		}
		dir := filepath.Dir(path)
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.PackageClauseOnly|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		documented[dir] = documented[dir] || file.Doc != nil
	})
	for dir, ok := range documented {
		if !ok {
			t.Errorf("package in %s has no package comment", dir)
		}
	}
}

// TestExportedIsDocumented demands a comment on every exported function, type
// and method outside commands; String says what every String says.
func TestExportedIsDocumented(t *testing.T) {
	sources(t, func(path string) {
		if filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "cmd") {
			return
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Name.IsExported() && d.Name.Name != "String" && d.Doc == nil && (d.Recv == nil || exportedReceiver(d)) {
					t.Errorf("%s: %s has no comment", set.Position(d.Pos()), d.Name.Name)
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if ts, ok := spec.(*ast.TypeSpec); ok && ts.Name.IsExported() && d.Doc == nil && ts.Doc == nil && ts.Comment == nil {
						t.Errorf("%s: type %s has no comment", set.Position(ts.Pos()), ts.Name.Name)
					}
				}
			}
		}
	})
}

func exportedReceiver(d *ast.FuncDecl) bool {
	typ := d.Recv.List[0].Type
	if p, ok := typ.(*ast.StarExpr); ok {
		typ = p.X
	}
	id, ok := typ.(*ast.Ident)
	return ok && id.IsExported()
}

// TestNoMachinePaths keeps the paths of one machine out of the sources.
func TestNoMachinePaths(t *testing.T) {
	bad := regexp.MustCompile(`(^|[^a-zA-Z0-9_.])/(work|root|home)/[a-z]`)
	sources(t, func(path string) {
		if path == "repo_test.go" {
			return
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if loc := bad.FindIndex(data); loc != nil {
			t.Errorf("%s names a path of one machine: %q", path, data[loc[0]:loc[1]])
		}
	})
}

// TestNativeCodeNeverExits: native code reports errors; it does not end the process.
func TestNativeCodeNeverExits(t *testing.T) {
	bad := regexp.MustCompile(`\b(abort|exit|_exit|assert)\s*\(`)
	sources(t, func(path string) {
		switch filepath.Ext(path) {
		case ".c", ".h", ".cpp", ".cu", ".cuh":
		default:
			return
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(data), "\n") {
			code, _, _ := strings.Cut(line, "//")
			if !strings.Contains(line, "_Static_assert") && bad.MatchString(code) {
				t.Errorf("%s:%d: %s", path, i+1, strings.TrimSpace(line))
			}
		}
	})
}
