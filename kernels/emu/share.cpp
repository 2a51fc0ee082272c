// share.cpp: memory of devices that processes share, as they share a GPU's, by a file (MARGO_EMU_SHARED).
//
// A process has a slot of the file, with what it has taken of each device, and locks a byte of its own for as long as it
// runs. The operating system drops the lock when the process ends, in whatever way: a slot without a lock counts for
// nothing, so what a killed process had taken is free again, as on a GPU. Another byte is locked while slots are read
// and one is written.
#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "state.h"

namespace emu {

namespace {

constexpr int kSlots = 64, kDevices = 64;
constexpr off_t kTable = 4096; // where slots begin, after the bytes that are locked

std::string path;
int file = -1, slot = -1;

off_t word(int at, int device) { return kTable + (off_t(at) * kDevices + device) * off_t(sizeof(uint64_t)); }

struct flock byte(short type, off_t at) {
	struct flock l {};
	l.l_type = type, l.l_whence = SEEK_SET, l.l_start = at, l.l_len = 1;
	return l;
}

struct Table { // is locked while this lives
	Table() {
		struct flock l = byte(F_WRLCK, 0);
		while (fcntl(file, F_SETLKW, &l) != 0 && errno == EINTR) {}
	}
	~Table() {
		struct flock l = byte(F_UNLCK, 0);
		fcntl(file, F_SETLK, &l);
	}
};

uint64_t read(int at, int device) {
	uint64_t v = 0;
	return pread(file, &v, sizeof v, word(at, device)) == ssize_t(sizeof v) ? v : 0; // the file ends before: never written
}

bool write(int device, uint64_t v) { return pwrite(file, &v, sizeof v, word(slot, device)) == ssize_t(sizeof v); }

} // namespace

void share_open(const std::string &wanted) {
	if (wanted != path) {
		if (file >= 0) close(file); // and the lock is gone
		path = wanted, file = slot = -1;
	}
	if (path.empty()) return;
	if (file < 0) file = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
	if (file < 0) return;
	Table table;
	for (int i = 0; slot < 0 && i < kSlots; i++) {
		struct flock l = byte(F_WRLCK, 1 + i);
		if (fcntl(file, F_SETLK, &l) == 0) slot = i;
	}
	for (int d = 0; slot >= 0 && d < kDevices; d++) write(d, 0);
}

bool share_set(int device, size_t used, size_t most, size_t *others) {
	if (path.empty()) return true;
	if (slot < 0) return most == SIZE_MAX; // no file, or too many processes: nothing can be taken
	Table table;
	uint64_t sum = 0;
	for (int i = 0; i < kSlots; i++) {
		uint64_t v = i == slot ? 0 : read(i, device);
		if (!v) continue;
		struct flock l = byte(F_WRLCK, 1 + i);
		if (fcntl(file, F_GETLK, &l) == 0 && l.l_type != F_UNLCK) sum += v;
	}
	if (others) *others = sum;
	return (sum <= most && used <= most - sum) && write(device, used);
}

} // namespace emu
