package dist

import (
	"net"
	"strconv"
	"strings"

	"margo/engine"
)

// Place is what a process knows about its group before it has met it.
type Place struct {
	Rank, Size int
	Local      int    // number among the ranks of this machine: which device to take
	Addr       string // host:port where rank 0 listens
	Job        string // name of the job: ranks of another one are refused
	From       string // who said so: "torchrun", "Open MPI", "PMI", "Slurm" or "--ranks"
}

// Ports, where the launcher names none.
const defaultPort = 29511

// launcher names the variables of one way to start ranks. A launcher is there if
// one of sign is set; rank and size are then needed.
type launcher struct {
	name              string
	sign              []string
	rank, size, local string
	localSize         string // ranks on this machine; "": unknown
	job               []string
}

// The order is that of precedence: torchrun may run inside a Slurm step, MPI's
// processes may be started by srun. A Slurm batch script has SLURM_PROCID and
// SLURM_NTASKS as well but is one process, so Slurm's sign is the number of a step
// (srun) together with a rank.
var launchers = []launcher{
	{"torchrun", []string{"RANK", "WORLD_SIZE"}, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", []string{"TORCHELASTIC_RUN_ID"}},
	{"Open MPI", []string{"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"}, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
		"OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", []string{"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"}},
	{"PMI", []string{"PMI_RANK", "PMI_SIZE"}, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", []string{"PMI_JOBID"}},
	{"Slurm", []string{"SLURM_STEP_ID", "SLURM_STEPID"}, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", []string{"SLURM_JOB_ID", "SLURM_JOBID"}},
}

// FromEnv finds out from a launcher's variables which rank this process is; nil
// without a launcher, or in a group of one. MARGO_ADDR (host:port) says where rank 0
// is to be met, over what the launcher says. An incomplete or inconsistent set of
// variables is an error of kind Invalid that names them.
func FromEnv(getenv func(string) string) (*Place, error) {
	for _, l := range launchers {
		if first(getenv, l.sign) == "" {
			continue
		}
		p, err := l.place(getenv)
		if err != nil || p.Size == 1 {
			return nil, err
		}
		if p.Addr, err = l.address(getenv, p.Size); err != nil {
			return nil, err
		}
		return p, nil
	}
	return nil, nil
}

func first(getenv func(string) string, names []string) string {
	for _, n := range names {
		if v := getenv(n); v != "" {
			return v
		}
	}
	return ""
}

func bad(format string, a ...any) error { return engine.Errorf("ranks", engine.Invalid, format, a...) }

// place reads rank, size and local rank.
func (l *launcher) place(getenv func(string) string) (*Place, error) {
	number := func(name string, low, high int) (int, error) {
		v := getenv(name)
		if v == "" {
			return 0, bad("%s's %s is not set", l.name, name)
		}
		n, err := strconv.Atoi(v)
		if err != nil || n < low || n > high {
			return 0, bad("%s's %s is %q, it must be a number from %d to %d", l.name, name, v, low, high)
		}
		return n, nil
	}
	p := &Place{From: l.name, Job: first(getenv, l.job)}
	var err error
	if p.Size, err = number(l.size, 1, maxRanks); err != nil {
		return nil, err
	}
	if p.Rank, err = number(l.rank, 0, maxRanks-1); err != nil {
		return nil, err
	}
	if p.Rank >= p.Size {
		return nil, bad("%s's %s is %d, but %s is %d", l.name, l.rank, p.Rank, l.size, p.Size)
	}
	if getenv(l.local) == "" {
		return p, nil
	}
	if p.Local, err = number(l.local, 0, maxRanks-1); err != nil {
		return nil, err
	}
	if p.Local > p.Rank { // ranks of a machine are a subset of all, numbered in their order
		return nil, bad("%s's %s is %d, but %s is %d", l.name, l.local, p.Local, l.rank, p.Rank)
	}
	return p, nil
}

// address is where rank 0 listens: MARGO_ADDR, else MASTER_ADDR and MASTER_PORT, else
// this machine if all ranks are on it, else the first of Slurm's nodes.
func (l *launcher) address(getenv func(string) string, size int) (string, error) {
	if v := getenv("MARGO_ADDR"); v != "" {
		if err := checkAddr(v); err != nil {
			return "", bad("MARGO_ADDR: %w", err)
		}
		return v, nil
	}
	port := defaultPort
	if v := getenv("MASTER_PORT"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > 65534 {
			return "", bad("MASTER_PORT is %q, it must be a number from 1 to 65534", v)
		}
		port = n
		if getenv("TORCHELASTIC_USE_AGENT_STORE") == "True" {
			port++ // torchrun's own store sits on MASTER_PORT
		}
	} else if job, err := strconv.Atoi(first(getenv, l.job)); err == nil && job > 0 {
		port = 20000 + job%10000 // jobs that share a machine should not meet
	}
	host := getenv("MASTER_ADDR")
	switch {
	case host != "":
	case l.name == "torchrun":
		return "", bad("torchrun's MASTER_ADDR is not set")
	case l.localSize != "" && getenv(l.localSize) == strconv.Itoa(size):
		host = "127.0.0.1"
	case l.name == "Slurm":
		nodes := first(getenv, []string{"SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"})
		if host = firstNode(nodes); host == "" {
			return "", bad("Slurm's SLURM_STEP_NODELIST is %q: no node can be read from it; set MARGO_ADDR to HOST:PORT of rank 0", nodes)
		}
	default:
		return "", bad("%s does not say where rank 0 is (%s is %q of %d ranks): set MARGO_ADDR to HOST:PORT of rank 0, the same for all",
			l.name, l.localSize, getenv(l.localSize), size)
	}
	return net.JoinHostPort(host, strconv.Itoa(port)), nil
}

func checkAddr(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || host == "" {
		return bad("%q is not HOST:PORT", addr)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
		return bad("%q: the port must be a number from 1 to 65535", addr)
	}
	return nil
}

// firstNode is the first node of a list as Slurm writes it: "n7", "n[03-05,9],m1",
// "rack[1-2]node[1-8]". "" if it cannot be read.
func firstNode(list string) string {
	var b strings.Builder
	for list != "" {
		open := strings.IndexAny(list, "[,")
		if open < 0 || list[open] == ',' {
			if open >= 0 {
				list = list[:open]
			}
			b.WriteString(list)
			break
		}
		shut := strings.IndexByte(list, ']')
		if shut < open {
			return ""
		}
		b.WriteString(list[:open])
		number, _, _ := strings.Cut(list[open+1:shut], ",")
		number, _, _ = strings.Cut(number, "-")
		b.WriteString(number)
		list = list[shut+1:]
	}
	return b.String()
}

// ParsePlace reads "R/N@HOST:PORT": rank R of N, which meets rank 0 there. R is also
// the rank's number on this machine.
func ParsePlace(s string) (*Place, error) {
	who, addr, ok := strings.Cut(s, "@")
	r, n, ok2 := strings.Cut(who, "/")
	rank, err := strconv.Atoi(r)
	size, err2 := strconv.Atoi(n)
	if !ok || !ok2 || err != nil || err2 != nil {
		return nil, bad("%q is not R/N@HOST:PORT, as 0/4@127.0.0.1:29511", s)
	}
	if size < 1 || size > maxRanks || rank < 0 || rank >= size {
		return nil, bad("%q: rank %d of %d; ranks go from 0 to N-1, N is at most %d", s, rank, size, maxRanks)
	}
	if err := checkAddr(addr); err != nil {
		return nil, err
	}
	return &Place{Rank: rank, Size: size, Local: rank, Addr: addr, From: "--ranks"}, nil
}

// Share is the rank's part of n items, contiguous: items first … first+count-1.
// Parts differ by at most one, and later ranks may have none.
func (p *Place) Share(n int) (first, count int) {
	each, more := n/p.Size, n%p.Size
	return p.Rank*each + min(p.Rank, more), each + b2i(p.Rank < more)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}
