/* One file, served by libfuse3's low-level interface from C, by one thread: what the kernel and the switches alone cost. */

#define FUSE_USE_VERSION 31

#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

enum { FILE_ID = 2 };

static struct stat root_status, file_status;

static void on_getattr(fuse_req_t request, fuse_ino_t node, struct fuse_file_info *file)
{
    (void)file;
    fuse_reply_attr(request, node == FILE_ID ? &file_status : &root_status, 0.0);
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
    (void)parent, (void)name;
    struct fuse_entry_param entry = {.ino = FILE_ID, .attr = file_status};
    fuse_reply_entry(request, &entry);
}

static void on_open(fuse_req_t request, fuse_ino_t node, struct fuse_file_info *file)
{
    (void)node;
    fuse_reply_open(request, file);
}

static const struct fuse_lowlevel_ops operations = {
    .getattr = on_getattr,
    .lookup = on_lookup,
    .open = on_open,
};

int main(int argc, char *argv[])
{
    struct fuse_args no_arguments = FUSE_ARGS_INIT(1, argv);
    if (argc != 2 || stat("/", &root_status) || stat(argv[0], &file_status)) {
        fprintf(stderr, "usage: libfuse3 MOUNTPOINT\n");
        return 1;
    }
    root_status.st_ino = FUSE_ROOT_ID;
    file_status.st_ino = FILE_ID;
    struct fuse_session *session = fuse_session_new(&no_arguments, &operations, sizeof(operations), NULL);
    if (!session || fuse_session_mount(session, argv[1]))
        return 1;
    int result = fuse_session_loop(session);
    fuse_session_unmount(session);
    fuse_session_destroy(session);
    return result != 0;
}
