// The only process of an emulated machine: runs /program with each line of /names as its argument, then ends the
// machine. A name's output lies between two lines, the second of which has its status, as waitpid has it.
#include <fcntl.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <string>

int main() {
    const int console = open("/dev/ttyS0", O_WRONLY);
    dup2(console, 1), dup2(console, 2);
    std::ifstream names("/names");
    for (std::string name; std::getline(names, name);) {
        printf("begun %s\n", name.c_str());
        fflush(stdout);
        const pid_t child = fork();
        if (child == 0) {
            execl("/program", "/program", name.c_str(), nullptr);
            _exit(127);
        }
        int status = -1;
        waitpid(child, &status, 0);
        printf("ended %s %d\n", name.c_str(), status);
        fflush(stdout);
    }
    fsync(1);
    tcdrain(1);
    reboot(RB_POWER_OFF);
}
