/* A libnvidia-ml.so.1 whose answers stand in the file that FAKE_NVML names, read anew at each call, so that
 * a test changes them while the daemon runs. A line is "<key> <number>"; a key that is not there has its
 * default. Only what the worker calls is here, with the signatures of NVIDIA's nvml.h.
 *
 *   hang 1            every call blocks until this is 0 again
 *   init E            nvmlInitWithFlags answers E
 *   count N           how many GPUs are listed; at most 4, default 1
 *   first I           which GPU is the first of the list
 *   gpuI.error E      every question about GPU I is answered with E (15: GPU is lost)
 *   gpuI.total_mb, gpuI.free_mb, gpuI.temperature, gpuI.utilization, gpuI.power_mw
 *   gpuI.ecc N        uncorrectable errors; without the key: not supported
 *   gpuI.pid, gpuI.pid_mb   the one process that computes on GPU I
 *   gpuI.xid X, gpuI.xids N X is announced each time N rises
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7, TIMEOUT = 10 };
enum { MAX_GPUS = 4 };

typedef struct { int index; } Device;
typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int gpu, memory; } Utilization;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gi, ci; } Process;
typedef struct { Device *device; unsigned long long type, data; unsigned int gi, ci; } Event;

static Device devices[MAX_GPUS] = {{0}, {1}, {2}, {3}};
static long xids_told[MAX_GPUS];
static int initialized;

static long long value(const char *key, long long otherwise)
{
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[200], name[100];
    long long number;
    if (!file)
        return otherwise;
    while (fgets(line, sizeof line, file))
        if (sscanf(line, "%99s %lld", name, &number) == 2 && strcmp(name, key) == 0)
            otherwise = number;
    fclose(file);
    return otherwise;
}

static long long gpu_value(const Device *device, const char *key, long long otherwise)
{
    char name[100];
    snprintf(name, sizeof name, "gpu%d.%s", device->index, key);
    return value(name, otherwise);
}

/* What every call begins with: it may hang, and knows whether NVML is open. */
static int enter(void)
{
    while (value("hang", 0))
        usleep(10000);
    return initialized ? SUCCESS : UNINITIALIZED;
}

static int ask(const Device *device)
{
    int error = enter();
    return error ? error : (int)gpu_value(device, "error", SUCCESS);
}

int nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    enter();
    int error = (int)value("init", SUCCESS);
    initialized = error == SUCCESS;
    return error;
}

int nvmlShutdown(void)
{
    int error = enter();
    initialized = 0;
    return error;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length)
{
    snprintf(version, length, "580.95.05");
    return enter();
}

int nvmlDeviceGetCount_v2(unsigned int *count)
{
    *count = (unsigned int)value("count", 1);
    return enter();
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, Device **device)
{
    *device = &devices[index + (unsigned int)value("first", 0)];
    return ask(*device);
}

int nvmlDeviceGetUUID(Device *device, char *uuid, unsigned int length)
{
    snprintf(uuid, length, "GPU-fake-%d", device->index);
    return ask(device);
}

int nvmlDeviceGetName(Device *device, char *name, unsigned int length)
{
    snprintf(name, length, "Fake RTX %d", device->index);
    return ask(device);
}

int nvmlDeviceGetMinorNumber(Device *device, unsigned int *number)
{
    *number = (unsigned int)device->index;
    return ask(device);
}

int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory)
{
    memory->total = (unsigned long long)gpu_value(device, "total_mb", 24564) << 20;
    memory->free = (unsigned long long)gpu_value(device, "free_mb", 24000) << 20;
    memory->used = memory->total - memory->free;
    return ask(device);
}

int nvmlDeviceGetUtilizationRates(Device *device, Utilization *rates)
{
    rates->gpu = (unsigned int)gpu_value(device, "utilization", 7);
    rates->memory = 0;
    return ask(device);
}

int nvmlDeviceGetTemperature(Device *device, unsigned int sensor, unsigned int *celsius)
{
    (void)sensor;
    *celsius = (unsigned int)gpu_value(device, "temperature", 45);
    return ask(device);
}

int nvmlDeviceGetPowerUsage(Device *device, unsigned int *milliwatts)
{
    *milliwatts = (unsigned int)gpu_value(device, "power_mw", 30500);
    return ask(device);
}

int nvmlDeviceGetTotalEccErrors(Device *device, unsigned int kind, unsigned int counter, unsigned long long *count)
{
    long long errors = gpu_value(device, "ecc", -1);
    (void)kind;
    (void)counter;
    *count = (unsigned long long)errors;
    return errors < 0 ? NOT_SUPPORTED : ask(device);
}

int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned int *count, Process *processes)
{
    long long pid = gpu_value(device, "pid", 0);
    unsigned int room = *count;
    *count = pid ? 1 : 0;
    if (room < *count)
        return INSUFFICIENT_SIZE;
    if (pid) {
        memset(processes, 0, sizeof *processes);
        processes->pid = (unsigned int)pid;
        processes->used = (unsigned long long)gpu_value(device, "pid_mb", 0) << 20;
    }
    return ask(device);
}

int nvmlEventSetCreate(void **set)
{
    *set = &devices;
    return enter();
}

int nvmlEventSetFree(void *set)
{
    (void)set;
    return enter();
}

int nvmlDeviceRegisterEvents(Device *device, unsigned long long types, void *set)
{
    (void)types;
    (void)set;
    return ask(device);
}

int nvmlEventSetWait_v2(void *set, Event *event, unsigned int timeout_ms)
{
    (void)set;
    for (unsigned int waited_ms = 0;; waited_ms += 10) {
        int error = enter();
        if (error)
            return error;
        for (int index = 0; index < MAX_GPUS; index++) {
            long told = (long)gpu_value(&devices[index], "xids", 0);
            if (told > xids_told[index]) {
                xids_told[index] = told;
                memset(event, 0, sizeof *event);
                event->device = &devices[index];
                event->type = 8;
                event->data = (unsigned long long)gpu_value(&devices[index], "xid", 0);
                return SUCCESS;
            }
        }
        if (waited_ms >= timeout_ms)
            return TIMEOUT;
        usleep(10000);
    }
}
